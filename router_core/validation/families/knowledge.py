"""Families of questions that stand in ../tables."""

from __future__ import annotations

from collections.abc import Mapping

from router_core.validation.families.helpers import Section, choices
from router_core.validation.families.open_tables import facts

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "commonsense": ("commonsense",),
    "science": ("physics", "electricity", "chemistry", "astronomy", "earth", "energy"),
    "biology": ("biology", "ecology", "evolution", "animals_and_plants"),
    "medicine": ("anatomy", "clinical_medicine", "nutrition", "genes_and_viruses", "ageing", "health"),
    "law_and_politics": ("law", "politics"),
    "economics_and_business": ("economics", "marketing", "firms", "methods"),
    "psychology_and_society": ("psychology", "sociology", "development", "behaviour"),
    "history": ("history", "prehistory"),
    "philosophy_and_religion": ("philosophy", "fallacies", "religion", "morals"),
    "computing": ("computer_science", "machine_learning", "computer_security"),
    "code_practice": ("code_practice",),
}
_FACTS = ("general_facts", "sport", "stage_and_screen", "places", "leaders", "colours")
_FACT_FRAMES = (
    "{q}",
    "{q} Answer with a word or two.",
    "Quick trivia: {q}",
    "hi! do you know this? {q}",
    "For a quiz night: {q} Just the answer, please.",
    "does anyone know: {q}",
)

SECTIONS = (
    *(Section(name, None, choices(name), family) for family, names in _CHOICES.items() for name in names),
    *(
        Section(name, 36 if name == "general_facts" else None, facts(name, _FACT_FRAMES), "general_facts")
        for name in _FACTS
    ),
)
