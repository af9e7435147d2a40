from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from random import Random

from router_core.validation.families import (
    accounting,
    arithmetic,
    chat,
    chinese,
    classification,
    code_functions,
    code_output,
    code_writing,
    debugging,
    formatting,
    json_extraction,
    knowledge,
    languages,
    logic,
    mathematics,
    reading,
    spanish,
    sql_queries,
    strings,
    summaries,
    tool_abstention,
    tool_arguments,
    tool_errors,
    tool_nesting,
    tool_parallel,
    tool_results,
    tool_selection,
    tool_steps,
    translation,
    units_dates,
    word_lists,
    word_problems,
    writing,
)
from router_core.validation.families.helpers import Draft, Section
from router_core.validation.validation_set import ValidationPrompt, ValidationSet

SECTIONS: tuple[Section, ...] = (
    *arithmetic.SECTIONS,
    *word_problems.SECTIONS,
    *mathematics.SECTIONS,
    *units_dates.SECTIONS,
    *logic.SECTIONS,
    *code_output.SECTIONS,
    *code_writing.SECTIONS,
    *code_functions.SECTIONS,
    *debugging.SECTIONS,
    *sql_queries.SECTIONS,
    *json_extraction.SECTIONS,
    *formatting.SECTIONS,
    *strings.SECTIONS,
    *word_lists.SECTIONS,
    *reading.SECTIONS,
    *summaries.SECTIONS,
    *writing.SECTIONS,
    *chat.SECTIONS,
    *classification.SECTIONS,
    *translation.SECTIONS,
    *chinese.SECTIONS,
    *spanish.SECTIONS,
    *languages.SECTIONS,
    *knowledge.SECTIONS,
    *accounting.SECTIONS,
    *tool_selection.SECTIONS,
    *tool_arguments.SECTIONS,
    *tool_nesting.SECTIONS,
    *tool_parallel.SECTIONS,
    *tool_abstention.SECTIONS,
    *tool_results.SECTIONS,
    *tool_errors.SECTIONS,
    *tool_steps.SECTIONS,
)

# Maps of a multilingual embedder are fitted with these too. No model is measured on them: the static embedder does not
# tell these languages apart, and takes a sum in Arabic for one in English.
FITTING_SECTIONS: tuple[Section, ...] = (*SECTIONS, *languages.MORE_SECTIONS)

_MAX_TRIES = 400

EMPTY_REPLIES = ("", "I don't know.", "...")


@lru_cache(maxsize=4)
def builtin_validation_set(seed: int = 0) -> ValidationSet:
    """Generate all sections. The same seed gives the same ids and texts on every machine."""
    return generate(SECTIONS, seed)


def generate(sections: Sequence[Section], seed: int) -> ValidationSet:
    return ValidationSet.from_prompts(prompt for section in sections for prompt in _prompts(section, seed))


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
    """Return whether the reference gets full marks, and neither an echo of the prompt nor an empty reply gets any."""
    graded = draft.grader.grade
    echoes = (draft.text, f"{draft.text}\n{draft.text}")
    return graded(draft.reference) == 1.0 and not any(graded(reply) for reply in (*echoes, *EMPTY_REPLIES))


def _prompt(family: str, draft: Draft) -> ValidationPrompt:
    content = f"{draft.system}\n{draft.text}"
    if draft.tools:
        content += f"\n{json.dumps([draft.tools, draft.turns])}"
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    system = ({"role": "system", "content": draft.system},) if draft.system else ()
    return ValidationPrompt(
        id=f"{family}-{digest}",
        family=family,
        messages=(*system, {"role": "user", "content": draft.text}, *draft.turns),
        grader=draft.grader,
        max_tokens=draft.max_tokens,
        level=draft.level,
        language=draft.language,
        reference=draft.reference,
        tools=draft.tools,
    )
