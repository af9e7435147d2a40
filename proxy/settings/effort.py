"""How much a model is to think: OpenAI's named efforts and Anthropic's budgets of tokens, on one scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

# Ascending. `none` asks for no thinking at all.
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")

# A name of EFFORTS, or a budget in tokens.
Effort = str | int

AUTO: Literal["auto"] = "auto"

# Anthropic refuses a smaller budget.
MIN_BUDGET = 1024

MAX_BUDGET = 1_000_000

# What Anthropic refuses beside thinking.
SAMPLING = ("temperature", "top_p", "top_k")

MAX_LISTED = 8

# The budget from which on a request for so many tokens of thinking is one for this effort.
_LEAST_TOKENS: Mapping[str, int] = dict(zip(EFFORTS, (0, 1, MIN_BUDGET, 4096, 16384, 32000, 64000), strict=True))

# The budget that says an effort to a model that takes budgets alone.
USUAL_TOKENS: Mapping[str, int] = {
    "minimal": MIN_BUDGET,
    "low": 2048,
    "medium": 8192,
    "high": 16384,
    "xhigh": 32000,
    "max": 32000,
}

# More than any budget.
NO_BOUND = 10**12


def least_tokens(effort: Effort) -> int:
    """Return the smallest bound that allows an effort, in tokens of thinking."""
    return effort if isinstance(effort, int) else _LEAST_TOKENS[effort]


def most_tokens(effort: Effort) -> int:
    """Return the largest budget that is no more than an effort."""
    if isinstance(effort, int):
        return effort
    above = EFFORTS[EFFORTS.index(effort) + 1 :]
    return _LEAST_TOKENS[above[0]] - 1 if above else NO_BOUND


def usual_tokens(effort: Effort) -> int:
    """Return how many tokens of thinking an effort usually comes to, at most."""
    return effort if isinstance(effort, int) else USUAL_TOKENS.get(effort, 0)


def budget_within(budget: int, limit: int | None) -> int | None:
    """Return the budget that leaves room in the limit of the whole answer, as Anthropic demands; None: none does."""
    if limit is None or budget < limit:
        return budget
    return max(MIN_BUDGET, limit // 2) if limit > MIN_BUDGET else None


def params_of(effort: Effort) -> dict[str, Any]:
    """Return the parameters by which a model is asked at an effort."""
    if isinstance(effort, int):
        return {"thinking": {"type": "enabled", "budget_tokens": effort}}
    return {"reasoning_effort": effort}


def efforts_of_text(text: str) -> str | list[str]:
    """Return what `effort` of `model_info` is where it is written in one line: auto, or efforts with commas."""
    efforts = [part.strip() for part in text.split(",") if part.strip()]
    return AUTO if efforts == [AUTO] else efforts


def read_efforts(value: object) -> object:
    """Read `auto`, or a list of efforts, as the list in ascending order. Raises ValueError."""
    if value is None or value == AUTO:
        return value
    listed = value if isinstance(value, list | tuple) else [value]
    if not 1 <= len(listed) <= MAX_LISTED:
        raise ValueError(f"must be auto, or a list of 1 to {MAX_LISTED} efforts; got {value!r}"[:200])
    efforts = {_effort(each) for each in listed}
    if len(efforts) < len(listed):
        raise ValueError(f"names an effort twice: {value!r}"[:200])
    return tuple(sorted(efforts, key=lambda effort: (least_tokens(effort), str(effort))))


def _effort(value: object) -> Effort:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value[:12])
    if isinstance(value, str) and value in EFFORTS:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and MIN_BUDGET <= value <= MAX_BUDGET:
        return value
    raise ValueError(
        f"an effort is one of {', '.join(EFFORTS)}, or a budget of {MIN_BUDGET} to {MAX_BUDGET} tokens of thinking; got"
        f" {value!r}"[:300]
    )
