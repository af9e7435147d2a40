"""What a request used and cost: every vendor's report read into one form, priced, and written as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import Any

import orjson

from router_core.pricing import TokenUsage, bill_usd, picousd
from router_core.types import Price


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """What an upstream reported, in OpenAI's convention whatever the upstream's was. None: it did not say."""

    prompt_tokens: int | None = None
    """All that was read: cached, written, sounds and images are part of it."""
    cached_tokens: int | None = None
    output_tokens: int | None = None
    """All that was written: reasoning, sounds and images are part of it."""
    reasoning_tokens: int | None = None
    written_tokens: int | None = None
    """To the provider's cache, for however long."""
    written_1h_tokens: int | None = None
    """Of these, those that are kept for an hour."""
    audio_input_tokens: int | None = None
    """Cached ones among them."""
    cached_audio_tokens: int | None = None
    image_input_tokens: int | None = None
    audio_output_tokens: int | None = None
    image_output_tokens: int | None = None

    @property
    def whole(self) -> int | None:
        """Prompt and answer together."""
        if self.prompt_tokens is None or self.output_tokens is None:
            return None
        return self.prompt_tokens + self.output_tokens

    def after(self, earlier: TokenCounts) -> TokenCounts:
        """A later report of the same answer: the half that it leaves out is as it was told before."""
        if self.prompt_tokens and self.output_tokens:
            return self
        kept = (*(() if self.prompt_tokens else _OF_PROMPT), *(() if self.output_tokens else _OF_ANSWER))
        return replace(self, **{name: getattr(earlier, name) for name in kept})


_OF_PROMPT = (
    *("prompt_tokens", "cached_tokens", "written_tokens", "written_1h_tokens"),
    *("audio_input_tokens", "cached_audio_tokens", "image_input_tokens"),
)
_OF_ANSWER = ("output_tokens", "reasoning_tokens", "audio_output_tokens", "image_output_tokens")


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """One answered, failed or abandoned request."""

    decision: str
    at: float
    """Unix seconds, at the end."""
    model: str
    key_id: str | None
    reason: str
    ending: str
    """complete, empty, failed, busy (nobody had a place), broken (after content), client_gone,
    shutdown (cut by the end of the server)."""
    prompt_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None
    reasoning_tokens: int | None
    cost_usd: float | None
    """None: tokens or price unknown."""
    seconds: float
    first_token_s: float | None
    reservation: str | None = None
    """What was set aside of the key's limits before the request, and is settled with this."""
    estimated: bool = False
    """The cost is an estimate: the model reported no usage, or not of all that came."""
    cache_write_tokens: int | None = None
    audio_input_tokens: int | None = None
    audio_output_tokens: int | None = None

    @property
    def cost_picousd(self) -> int | None:
        """The cost as sums of it are kept."""
        return None if self.cost_usd is None else picousd(self.cost_usd)

    def to_json(self) -> str:
        stored = dict(zip(_STORED, (*_values(self), self.cost_picousd), strict=True))
        try:
            return orjson.dumps(stored).decode()
        except TypeError:  # a cost beyond 64 bits
            return json.dumps(stored)


_NAMES = tuple(column.name for column in fields(UsageRecord))
_STORED = (*_NAMES, "cost_picousd")
_values = attrgetter(*_NAMES)


MAX_TOKENS = 10**12
"""Of one request; a report of more is none."""
_PROMPT = ("prompt_tokens", "input_tokens", "promptTokenCount", "inputTokens", "prompt_eval_count")
_OUTPUT = ("completion_tokens", "output_tokens", "candidatesTokenCount", "outputTokens", "eval_count")
_TOTAL = ("total_tokens", "totalTokenCount", "totalTokens")
_PROMPT_DETAILS = ("prompt_tokens_details", "input_tokens_details", "input_token_details", "promptTokensDetails")
_OUTPUT_DETAILS = ("completion_tokens_details", "output_tokens_details", "output_token_details")
_GEMINI_OUTPUT_DETAILS = "candidatesTokensDetails"
_APART_READ = ("cache_read_input_tokens", "cacheReadInputTokens")
_APART_WRITTEN = ("cache_creation_input_tokens", "cacheWriteInputTokens")
"""Anthropic's and Bedrock's names: beside `input_tokens` they count what that does not."""
_READ = (
    *_APART_READ,
    *("cached_tokens", "prompt_cache_hit_tokens", "num_cached_tokens", "cachedContentTokenCount"),
    *("cache_read_tokens", "cache_read"),
)
_WRITTEN = (
    *_APART_WRITTEN,
    *("cache_write_tokens", "cache_creation_tokens", "cached_creation_tokens", "cache_write_input_tokens"),
    "cache_creation",
)
_WRITTEN_5M = ("ephemeral_5m_input_tokens", "claude_cache_creation_5_m_tokens")
_WRITTEN_1H = ("ephemeral_1h_input_tokens", "claude_cache_creation_1_h_tokens")
_REASONING = ("reasoning_tokens", "thoughtsTokenCount", "thinking_tokens", "reasoning")
_ELSEWHERE = ("usageMetadata", "usage_metadata")
_WITHIN = ("x_groq", "message", "response")
"""Members of a chunk with a `usage` of their own: Groq's, Anthropic's message_start, events of the Responses API."""


def usage_of(body: Mapping[str, Any]) -> Any:
    """The usage that a completion or a chunk reports, wherever its vendor puts it; None: it reports none."""
    return body.get("usage") or _usage_elsewhere(body)


def _usage_elsewhere(body: Mapping[str, Any]) -> Any:
    choices = body.get("choices")
    if choices and type(choices) is list:
        for choice in reversed(choices):
            if type(choice) is dict and (usage := choice.get("usage")):
                return usage
    for name in _ELSEWHERE:
        if usage := body.get(name):
            return usage
    for name in _WITHIN:
        if isinstance(part := body.get(name), Mapping) and (usage := part.get("usage")):
            return usage
    return None


def counts_of(usage: object) -> TokenCounts:
    """Read a report of usage. What is missing or broken in it is None; it never fails.

    Vendors disagree on two things. Is what a cache read and wrote part of the prompt's count (OpenAI, DeepSeek, Gemini)
    or beside it (Anthropic, Bedrock)? Is reasoning part of the answer's (OpenAI, DeepSeek) or beside it (xAI, Gemini,
    Perplexity)? The total says which, where there is one; else the names do. A part is never larger than its whole.
    """
    if not isinstance(usage, Mapping):
        return TokenCounts()
    into, out = _details(usage, _PROMPT_DETAILS), _details(usage, _OUTPUT_DETAILS)
    split = _details(usage, ("cache_creation",)) or _details(into, ("cache_creation_token_details",))
    written_1h = _largest((usage, split), _WRITTEN_1H)
    written = _largest((usage, into), _WRITTEN)
    if written_1h is not None:
        written = max(written or 0, written_1h + (_largest((usage, split), _WRITTEN_5M) or 0))
    cached = _largest((usage, into), _READ)
    reasoning = _largest((usage, out), _REASONING)
    prompt, output = _whole(usage, cached or 0, written or 0, reasoning or 0)
    modes_in, modes_out = _modes(usage, _PROMPT_DETAILS[-1]), _modes(usage, _GEMINI_OUTPUT_DETAILS)
    cached_parts = _details(into, ("cached_tokens_details",)) or _modes(usage, "cacheTokensDetails")
    if not reasoning and output is not None and prompt is not None:
        # the answer as it was told, and more in the total: thoughts that nobody counts apart
        told = _first(usage, _OUTPUT)
        reasoning = output - told if told is not None and output > told else reasoning
    return TokenCounts(
        prompt_tokens=prompt,
        cached_tokens=cached,
        output_tokens=output,
        reasoning_tokens=reasoning,
        written_tokens=written,
        written_1h_tokens=written_1h,
        audio_input_tokens=_largest((into, modes_in), ("audio_tokens",)),
        cached_audio_tokens=_largest((cached_parts,), ("audio_tokens",)),
        image_input_tokens=_largest((into, modes_in), ("image_tokens",)),
        audio_output_tokens=_largest((out, modes_out), ("audio_tokens",)),
        image_output_tokens=_largest((out, modes_out), ("image_tokens",)),
    )


def _whole(usage: Mapping[str, Any], cached: int, written: int, reasoning: int) -> tuple[int | None, int | None]:
    """All tokens of the prompt and all of the answer."""
    prompt, output, total = _first(usage, _PROMPT), _first(usage, _OUTPUT), _first(usage, _TOTAL) or 0
    used_by_tools = _count(usage.get("toolUsePromptTokenCount"))
    if used_by_tools:
        prompt = (prompt or 0) + used_by_tools
    if not prompt:
        # all of it came from a cache, or only the total tells
        read = max(total - output if output else 0, cached + written)
        return read or prompt, _answer(output, reasoning)
    beside = _is_beside(usage, prompt, cached + written)
    if output is None and total <= prompt:
        return prompt + (cached + written if beside else 0), _answer(output, reasoning)
    return _agreeing(prompt, output or 0, total, cached + written, reasoning, beside=beside)


def _agreeing(prompt: int, output: int, total: int, cache: int, reasoning: int, *, beside: bool) -> tuple[int, int]:
    """The two wholes by the convention whose sum is the total, else by what the names say (`beside`)."""
    wholes = [
        (prompt + (cache if cache_beside else 0), output + (reasoning if thoughts_beside else 0))
        for cache_beside in (beside, not beside)
        for thoughts_beside in (reasoning > output, reasoning <= output)
    ]
    for read, written in wholes:
        if read + written == total and cache <= read and reasoning <= written:
            return read, written
    read, written = wholes[0]
    return read, max(written, total - read)


def _answer(output: int | None, reasoning: int) -> int | None:
    """With the reasoning where that is more than a part of it can be."""
    return (output or 0) + reasoning if reasoning > (output or 0) else output


def _is_beside(usage: Mapping[str, Any], prompt: int, cache: int) -> bool:
    """Whether the names, or the figures, say that what the cache read and wrote is not part of the prompt's count."""
    if cache > prompt:
        return True
    named = any(_count(usage.get(name)) is not None for name in (*_APART_READ, *_APART_WRITTEN))
    return named and not _count(usage.get("prompt_tokens"))


def _details(usage: Mapping[str, Any], names: tuple[str, ...]) -> Mapping[str, Any]:
    found = (usage.get(name) for name in names)
    return next((value for value in found if isinstance(value, Mapping)), {})


def _modes(usage: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Gemini's list of modalities, as OpenAI's details."""
    listed = usage.get(name)
    return dict(_modes_of(listed)) if isinstance(listed, list) else {}


def _modes_of(listed: list[Any]) -> Iterator[tuple[str, Any]]:
    for part in listed:
        if isinstance(part, Mapping) and isinstance(part.get("modality"), str):
            yield f"{part['modality'].lower()}_tokens", part.get("tokenCount")


def _first(usage: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """The first that is more than nothing: some gateways send several vendors' names, all but one of them zero."""
    counts = [count for name in names if (count := _count(usage.get(name))) is not None]
    return next((count for count in counts if count), counts[0] if counts else None)


def _largest(parts: tuple[Mapping[str, Any], ...], names: tuple[str, ...]) -> int | None:
    """The same figure may stand in several places, in some of them as zero."""
    counts = [count for part in parts for name in names if (count := _count(part.get(name))) is not None]
    return max(counts, default=None)


def _count(value: object) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_TOKENS else None


def buckets_of(counts: TokenCounts) -> TokenUsage:
    """Make the counts disjoint; none is larger than what is left of its whole. An unknown whole is empty."""
    prompt, output = counts.prompt_tokens or 0, counts.output_tokens or 0
    cached = min(counts.cached_tokens or 0, prompt)
    written = min(counts.written_tokens or 0, prompt - cached)
    written_1h = min(counts.written_1h_tokens or 0, written)
    left = prompt - cached - written
    cached_audio = min(counts.cached_audio_tokens or 0, cached)
    audio_in = min(max((counts.audio_input_tokens or 0) - cached_audio, 0), left)
    images_in = min(counts.image_input_tokens or 0, left - audio_in)
    reasoning = min(counts.reasoning_tokens or 0, output)
    audio_out = min(counts.audio_output_tokens or 0, output - reasoning)
    images_out = min(counts.image_output_tokens or 0, output - reasoning - audio_out)
    return TokenUsage(
        fresh_tokens=left - audio_in - images_in,
        cached_tokens=cached - cached_audio,
        output_tokens=output - reasoning - audio_out - images_out,
        written_tokens=written - written_1h,
        written_1h_tokens=written_1h,
        audio_input_tokens=audio_in,
        cached_audio_tokens=cached_audio,
        image_input_tokens=images_in,
        reasoning_tokens=reasoning,
        audio_output_tokens=audio_out,
        image_output_tokens=images_out,
    )


def cost_usd(counts: TokenCounts, price: Price | None) -> float | None:
    """What was reported, each token paid once. None: the price, or one half of the report, is not known."""
    if price is None or counts.prompt_tokens is None or counts.output_tokens is None:
        return None
    return bill_usd(price, buckets_of(counts))
