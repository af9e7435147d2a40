"""The token limits of a chat body, under every name by which some upstream would read them.

OpenAI's own names state the limit of an answer. All others can only raise what is reserved for it: whether an upstream
heeds them is not known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from proxy.errors import BadRequest
from proxy.settings.litellm_params import plain_name
from router_core.eligibility import output_limit
from router_core.pool import Pool
from router_core.text import BYTES_PER_TOKEN, text_bytes
from router_core.types import Requirements

# OpenAI's names for the token limit of one answer, its reasoning included.
LIMIT_FIELDS = ("max_completion_tokens", "max_tokens")
# Larger numbers are read as this one.
MAX_TOKENS = 10**9
# Names for how many answers are asked for.
COUNT_FIELDS = ("n", "best_of")
# OpenAI's bound of `n`. Without one, a request could cost any multiple of what is reserved for it.
MAX_ANSWERS = 128

# Most requests state none of these, which is quick to tell.
_STATED = frozenset((*LIMIT_FIELDS, *COUNT_FIELDS))

# Names by which other upstreams read the same. They are compared without case, underscores and hyphens.
_OTHER_LIMITS = frozenset(
    """
    maxtokens maxcompletiontokens maxoutputtokens maxnewtokens maxtokenstosample maxgenlen maxgentoks maxlength
    maxtokencount maxoutputlength maxgeneratedtokens maxgenerationtokens maxnewtokencount maxresponsetokens
    maxresponseoutputtokens numpredict npredict tokenstogenerate
""".split()
)
_OTHER_COUNTS = frozenset(
    """
    n bestof numreturnsequences candidatecount numcompletions numgenerations numresults numbeams beamwidth ncmpl
""".split()
)
_THINKING = frozenset("thinking thinkingconfig thinkingoptions reasoning reasoningconfig reasoningoptions".split())
# Token limits of reasoning alone. Every limit within one of the objects above is one too.
_BUDGETS = frozenset(
    """
    budgettokens tokenbudget thinkingbudget thinkingbudgettokens thinkingtokenbudget maxthinkingtokens thinkingtokens
    reasoningbudget reasoningbudgettokens reasoningtokenbudget maxreasoningtokens reasoningtokens
""".split()
)
# Top-level fields that hold no limit: content, schemas, and what OpenAI defines.
_CONTENT = frozenset(
    """
    model messages stream stream_options tools tool_choice functions function_call response_format metadata prediction
    stop user temperature top_p seed presence_penalty frequency_penalty logit_bias logprobs top_logprobs
    parallel_tool_calls reasoning_effort store audio modalities verbosity service_tier web_search_options
    prompt_cache_key safety_identifier guided_json guided_grammar guided_regex guided_choice structured_outputs
    json_schema response_schema grammar
""".split()
)
_NOT_SEARCHED = _CONTENT.union(LIMIT_FIELDS)


@dataclass(frozen=True, slots=True)
class TokenLimits:
    """What a body states about the length and the number of its answers."""

    limit: int | None = None
    """Tokens of one answer, under OpenAI's names. None: not stated."""
    other_limit: int = 0
    """The largest limit under another name."""
    unlimited: bool = False
    """One of the other names states that the answer or its reasoning has no limit."""
    answers: int = 1
    thinking: int = 0
    """Tokens stated for reasoning alone."""
    predicted: int = 0
    """Tokens of `prediction`. Those that the model does not use are billed as output."""

    @property
    def stated(self) -> bool:
        """Whether anything limits how long an answer may be."""
        return self.limit is not None or self.other_limit > 0 or self.thinking > 0

    def output_tokens(self, usual: int, *, thinking_within: bool = False) -> int:
        """Return how many tokens all answers together may have.

        Args:
            usual: tokens to expect of an answer whose length is not limited.
            thinking_within: the provider counts reasoning within a stated limit, and so accepts no larger budget.
        """
        limit = usual if self.limit is None else self.limit
        if self.unlimited:
            limit = max(limit, usual)
        limit = max(limit, self.other_limit)
        if not (thinking_within and self.limit is not None and self.thinking <= limit):
            limit += self.thinking
        return self.answers * (limit + self.predicted)


def stated_limit(body: Mapping[str, Any]) -> int | None:
    """Return the token limit of one answer under OpenAI's names, the larger if they differ; None: not stated.

    The parameters of a model state it in the same way as a body.
    """
    largest = 0
    for name in LIMIT_FIELDS:
        if (stated := body.get(name)) is not None and (limit := _positive(stated)) is not None and limit > largest:
            largest = limit
    return largest or None


def requested_answers(body: Mapping[str, Any]) -> int:
    """Return how many answers OpenAI's fields ask for."""
    largest = 1
    for name in COUNT_FIELDS:
        if (stated := body.get(name)) is not None:
            largest = max(largest, _positive(stated) or 1)
    return min(largest, MAX_ANSWERS)


def check_token_limits(body: Mapping[str, Any]) -> None:
    """Refuse limits that two upstreams could read differently.

    Raises:
        BadRequest: a limit is no whole number, its two names contradict each other, or too many answers are requested.
    """
    if _STATED.isdisjoint(body):
        return
    before: tuple[str, Any] | None = None
    for name in LIMIT_FIELDS:
        value = body.get(name)
        if value is None:
            continue
        if not _is_whole(value):
            raise BadRequest(f"`{name}` must be a whole number of tokens; got {value!r}"[:200], param=name)
        if before is not None and before[1] != value:
            both = f"`{before[0]}` ({str(before[1])[:20]}) and `{name}` ({str(value)[:20]})"
            raise BadRequest(f"{both} are two names of one limit: send one of them", param=name)
        before = name, value
    for name in COUNT_FIELDS:
        count = body.get(name)
        if count is not None and not (type(count) is int and 1 <= count <= MAX_ANSWERS):
            message = f"`{name}` must be a whole number from 1 to {MAX_ANSWERS}; got {count!r}"
            raise BadRequest(message[:200], param=name)


def _is_whole(value: Any) -> bool:
    return type(value) is int or (isinstance(value, float) and value.is_integer())


def smaller_limit(pool: Pool, name: str, requirements: Requirements) -> int | None:
    """Return the token limit that a model is sent in place of a larger one of the request; None: it is unchanged."""
    requested = requirements.max_output_tokens
    if requested is None:
        return None
    sent = output_limit(pool, pool.index[name], requirements)
    return None if sent == requested else sent


def with_limit(body: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """Return the same body with another token limit of one answer, under those names by which it states one."""
    return {name: limit if name in LIMIT_FIELDS and value is not None else value for name, value in body.items()}


def token_limits_of(body: Mapping[str, Any]) -> TokenLimits:
    """Read every limit that some upstream could read in a body. Never fails."""
    if body.keys() <= _NOT_SEARCHED:
        return TokenLimits(stated_limit(body), predicted=_predicted(body.get("prediction")))
    others: list[float] = [0]
    counts: list[float] = [requested_answers(body)]
    budgets: list[float] = [0]
    for name, amount, thinking in _amounts(body):
        if name in _BUDGETS or (thinking and name in _OTHER_LIMITS):
            budgets.append(amount)
        elif name in _OTHER_LIMITS:
            others.append(amount)
        elif name in _OTHER_COUNTS:
            counts.append(amount)
    return TokenLimits(
        limit=stated_limit(body),
        other_limit=_whole(max(others)),
        unlimited=min(*others, *budgets) < 0,
        answers=_whole(max(counts)),
        thinking=_whole(max(budgets)),
        predicted=_predicted(body.get("prediction")),
    )


def _amounts(body: Mapping[str, Any]) -> Iterator[tuple[str, float, bool]]:
    """Yield the plain name of each number, the number, and whether it is within an object about reasoning."""
    pending = [(plain_limit_name(name), value, False) for name, value in body.items() if name not in _NOT_SEARCHED]
    while pending:
        name, value, thinking = pending.pop()
        if isinstance(value, Mapping):
            within = thinking or name in _THINKING
            pending += [(plain_limit_name(inner_name), inner, within) for inner_name, inner in value.items()]
        elif isinstance(value, list):
            pending += [(name, inner, thinking) for inner in value if isinstance(inner, Mapping | list)]
        elif (amount := _amount(value)) is not None:
            yield name, amount, thinking


def plain_limit_name(name: str) -> str:
    """Return a name as a lenient reader compares it: maxOutputTokens and max-output-tokens are max_output_tokens."""
    return plain_name(name).replace("_", "").replace("-", "")


def _amount(value: Any) -> float | None:
    """Read a number, even if it is written as a string; None if it is something else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and len(value) > 40:
        return None
    try:
        amount = float(value)
    except ValueError:
        return None
    except OverflowError:
        return math.inf
    return None if math.isnan(amount) else amount


def _whole(amount: float) -> int:
    """Round up to a whole number from 0 to MAX_TOKENS."""
    return math.ceil(min(max(amount, 0), MAX_TOKENS))


def _positive(value: Any) -> int | None:
    """Read a number above 0; None if it is something else. Servers that accept 0 or less read it as not stated."""
    if type(value) is int and 0 < value <= MAX_TOKENS:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        return None
    return math.ceil(min(value, MAX_TOKENS))


def _predicted(prediction: Any) -> int:
    """Estimate the tokens of a body's `prediction`."""
    if prediction is None:
        return 0
    content = prediction.get("content") if isinstance(prediction, Mapping) else None
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    return sum(text_bytes(text) for text in texts if isinstance(text, str)) // BYTES_PER_TOKEN
