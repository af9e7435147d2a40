"""What models answered to the validation prompts of a cluster, and how that was graded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proxy.profiling.job_store import MAX_TEXT_CHARS, PromptAnswer
from proxy.server.dependencies import AppState
from proxy.storage.redis import StoreUnavailable
from router_core.text import plain
from router_core.validation.validation_set import ValidationPrompt

# Of all answers on one page. With many models each is shown shorter.
MAX_PAGE_CHARS = 1_000_000

MAX_EXPECTED_CHARS = 2_000


@dataclass(frozen=True, slots=True)
class ShownAnswer:
    """What one model answered to a prompt."""

    model: str
    answer: PromptAnswer
    text: str | None
    """None: it was not kept."""
    is_whole: bool

    @property
    def verdict(self) -> str:
        if self.answer.failed:
            return "no answer came"
        if self.answer.score is None:
            return "not graded"
        return f"grade {self.answer.score:.3g}"


@dataclass(frozen=True, slots=True)
class ShownPrompt:
    """A prompt of a cluster, how answers to it are graded, and the answers."""

    prompt: ValidationPrompt
    share: float
    """How much of it is in the cluster."""
    context: str
    """The tools that it offers, and the turns that follow the user's. Empty if it offers none."""
    grader: str
    expected: str
    answers: Mapping[str, ShownAnswer]
    """By model."""


async def answers_to(state: AppState, prompts: Sequence[ValidationPrompt]) -> dict[str, dict[str, PromptAnswer]]:
    """Return the answers that are still kept, by model and id of the prompt, of the models that have any."""
    try:
        found = await state.jobs.latest_answers(state.snapshots.current.models, [prompt.id for prompt in prompts])
    except StoreUnavailable:
        return {}
    return {model: answers for model, answers in found.items() if answers}


def shown_prompts(
    prompts: Sequence[tuple[ValidationPrompt, float]], answers: Mapping[str, Mapping[str, PromptAnswer]]
) -> list[ShownPrompt]:
    """Put prompts, each with its share of the cluster, and answers together, within MAX_PAGE_CHARS."""
    count = sum(len(found) for found in answers.values())
    most = min(MAX_TEXT_CHARS, MAX_PAGE_CHARS // max(count, 1))
    return [
        ShownPrompt(
            prompt,
            share,
            _context(prompt),
            str(prompt.grader.to_json()["type"]),
            _expected(prompt),
            {model: _shown(model, found[prompt.id], most) for model, found in answers.items() if prompt.id in found},
        )
        for prompt, share in prompts
    ]


def _shown(model: str, answer: PromptAnswer, most: int) -> ShownAnswer:
    kept = answer.text
    if kept is None:
        return ShownAnswer(model, answer, None, is_whole=False)
    is_whole = kept.is_whole and len(kept.beginning) <= most
    return ShownAnswer(model, answer, plain(kept.beginning[:most]), is_whole)


def _context(prompt: ValidationPrompt) -> str:
    """Write the names of the tools, and calls and results, one a line."""
    if not prompt.tools:
        return ""
    request: Mapping[str, Any] = prompt.request
    lines = [f"tools: {', '.join(tool['function']['name'] for tool in request['tools'])}"]
    for message in request["messages"]:
        calls = message.get("tool_calls", ())
        lines += [f"called: {call['function']['name']} {call['function']['arguments']}" for call in calls]
        if message["role"] in ("system", "developer", "tool"):
            lines.append(f"{message['role']}: {message['content']}")
    return _cut(plain("\n".join(lines)))


def _expected(prompt: ValidationPrompt) -> str:
    """Write what the grader looks for, one of its fields a line."""
    spec = {name: value for name, value in prompt.grader.to_json().items() if name != "type"}
    lines = (
        f"{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
        for name, value in spec.items()
    )
    return _cut(plain("\n".join(lines)))


def _cut(text: str) -> str:
    return text if len(text) <= MAX_EXPECTED_CHARS else f"{text[:MAX_EXPECTED_CHARS]}…"
