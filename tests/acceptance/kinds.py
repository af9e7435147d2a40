from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from router_core.validation.families.registry import builtin_validation_set
from router_core.validation.validation_set import ValidationPrompt

KINDS = {
    "maths": {"arithmetic", "word_problems", "mathematics", "units"},
    "code": {"code_output", "code_writing", "code_practice", "debugging", "sql"},
    "chinese": {"chinese", "chinese_facts"},
    "spanish": {"spanish", "spanish_facts"},
}
# Seeds: the set that every model is profiled on, and one that no profile ever saw.
MEASURED, HELD_BACK = 0, 7
IGNORANCE = "I am not able to help with that."


@dataclass(frozen=True)
class Library:
    """Hold every prompt of both seeds by its text, as an upstream sees it."""

    by_text: dict[str, ValidationPrompt]
    held_back: tuple[ValidationPrompt, ...]

    @classmethod
    def open(cls) -> Library:
        measured = builtin_validation_set(MEASURED)
        known = {prompt.text for prompt in measured}
        held_back = tuple(prompt for prompt in builtin_validation_set(HELD_BACK) if prompt.text not in known)
        return cls({prompt.text: prompt for prompt in (*measured, *held_back)}, held_back)

    def of_kind(self, kind: str, most: int = 30) -> list[ValidationPrompt]:
        """Return held-back prompts of one kind, spread over its families."""
        prompts = [prompt for prompt in self.held_back if prompt.family in KINDS[kind]]
        return prompts[:: max(1, len(prompts) // most)][:most]

    def skill(self, *kinds: str) -> Callable[[str], str]:
        """Answer prompts of these kinds right (all if none is named), and give useless answers to others."""
        families = set().union(*(KINDS[kind] for kind in kinds))

        def answer(text: str) -> str:
            prompt = self.by_text.get(text)
            knows = prompt is not None and (not kinds or prompt.family in families)
            return (prompt.reference or IGNORANCE) if prompt and knows else IGNORANCE

        return answer

    def is_right(self, prompt: ValidationPrompt, answer: str) -> bool:
        return prompt.grader.grade(answer) == 1.0
