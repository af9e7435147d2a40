"""The built-in validation set: every family's prompts, made from one seed. What the prompts say: families/."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from random import Random

from router_core.validation.families.catalogue import SECTIONS
from router_core.validation.families.kit import Draft, Section
from router_core.validation.prompts import ValidationPrompt, ValidationSet

_MAX_TRIES = 400
EMPTY_REPLIES = ("", "I don't know.", "...")


@lru_cache(maxsize=4)
def builtin_validation_set(seed: int = 0) -> ValidationSet:
    """The same seed gives the same ids and texts on every machine; another seed gives other prompts."""
    return ValidationSet.of(prompt for section in SECTIONS for prompt in _prompts(section, seed))


def _prompts(section: Section, seed: int) -> Iterator[ValidationPrompt]:
    rng = Random(f"{seed}:{section.name}")  # noqa: S311 - reproducible on purpose; nothing secret is drawn
    seen: set[str] = set()
    for tries, draft in enumerate(section.drafts(rng)):
        if len(seen) == section.count or tries == _MAX_TRIES:
            break
        if draft.text not in seen and is_fair(draft):
            seen.add(draft.text)
            yield _prompt(section.family or section.name, draft)
    if section.count is not None and len(seen) < section.count:
        raise RuntimeError(f"section {section.name} gave {len(seen)} of {section.count} prompts")


def is_fair(draft: Draft) -> bool:
    """The reference is right, and neither repeating the prompt nor saying nothing is."""
    graded = draft.grader.grade
    echoes = (draft.text, f"{draft.text}\n{draft.text}")
    return graded(draft.reference) == 1.0 and not any(graded(reply) for reply in (*echoes, *EMPTY_REPLIES))


def _prompt(family: str, draft: Draft) -> ValidationPrompt:
    digest = hashlib.sha256(f"{draft.system}\n{draft.text}".encode()).hexdigest()[:8]
    system = ({"role": "system", "content": draft.system},) if draft.system else ()
    return ValidationPrompt(
        id=f"{family}-{digest}",
        family=family,
        messages=(*system, {"role": "user", "content": draft.text}),
        grader=draft.grader,
        max_tokens=draft.max_tokens,
        level=draft.level,
        language=draft.language,
        reference=draft.reference,
    )
