from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from types import MappingProxyType
from typing import Any

from proxy.json_text import encode_json
from router_core.pricing import TokenUsage, bill_usd, picousd
from router_core.text import BYTES_PER_TOKEN
from router_core.types import Price, frozen


@frozen
class TokenCounts:
    """The usage that an upstream reported, in OpenAI's convention. None: it did not say."""

    prompt_tokens: int | None = None
    """All of the prompt, with cached tokens, tokens written to a cache, sounds and images."""
    cached_tokens: int | None = None
    output_tokens: int | None = None
    """All of the answer, with reasoning, sounds and images."""
    reasoning_tokens: int | None = None
    written_tokens: int | None = None
    """Written to the provider's cache, for however long."""
    written_1h_tokens: int | None = None
    """Of these, those that are kept for an hour."""
    audio_input_tokens: int | None = None
    """Cached ones among them."""
    cached_audio_tokens: int | None = None
    image_input_tokens: int | None = None
    audio_output_tokens: int | None = None
    image_output_tokens: int | None = None

    @property
    def total(self) -> int | None:
        """Return the tokens of prompt and answer together."""
        if self.prompt_tokens is None or self.output_tokens is None:
            return None
        return self.prompt_tokens + self.output_tokens

    def after(self, earlier: TokenCounts) -> TokenCounts:
        """Complete a later report of the same answer with the half, prompt or answer, that only `earlier` has."""
        if self.prompt_tokens and self.output_tokens:
            return self
        kept = [
            *(_OF_PROMPT if earlier.prompt_tokens and not self.prompt_tokens else ()),
            *(_OF_ANSWER if earlier.output_tokens and not self.output_tokens else ()),
        ]
        return replace(self, **{name: getattr(earlier, name) for name in kept})


NOTHING_REPORTED = TokenCounts()

_OF_PROMPT = (
    *("prompt_tokens", "cached_tokens", "written_tokens", "written_1h_tokens"),
    *("audio_input_tokens", "cached_audio_tokens", "image_input_tokens"),
)

_OF_ANSWER = ("output_tokens", "reasoning_tokens", "audio_output_tokens", "image_output_tokens")


@frozen
class UsageRecord:
    """One answered, failed or abandoned request."""

    decision: str
    at: float
    """Unix seconds, at the end."""
    model: str
    key_id: str | None
    reason: str
    ending: str
    """complete, empty, failed, busy (every model at capacity), broken (after content), client_gone,
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
    """The reservation of the key's limits that this record settles."""
    estimated: bool = False
    """The cost is an estimate: the model reported no usage, or not for the whole answer."""
    cache_write_tokens: int | None = None
    audio_input_tokens: int | None = None
    audio_output_tokens: int | None = None
    tags: tuple[str, ...] = ()

    @property
    def total_tokens(self) -> int | None:
        """Return the tokens of prompt and answer together."""
        if self.prompt_tokens is None or self.output_tokens is None:
            return None
        return self.prompt_tokens + self.output_tokens

    @property
    def cost_picousd(self) -> int | None:
        """Return the cost in the unit in which sums are kept."""
        return None if self.cost_usd is None else picousd(self.cost_usd)

    def to_json(self) -> str:
        stored = {
            "decision": self.decision,
            "at": self.at,
            "model": self.model,
            "key_id": self.key_id,
            "reason": self.reason,
            "ending": self.ending,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "reasoning_tokens": self.reasoning_tokens,
            "cost_usd": self.cost_usd,
            "seconds": self.seconds,
            "first_token_s": self.first_token_s,
            "reservation": self.reservation,
            "estimated": self.estimated,
            "cache_write_tokens": self.cache_write_tokens,
            "audio_input_tokens": self.audio_input_tokens,
            "audio_output_tokens": self.audio_output_tokens,
            "tags": self.tags,
            "cost_picousd": self.cost_picousd,
        }
        return encode_json(stored).decode()


# Of one request. A report of more is ignored.
MAX_TOKENS = 10**12

# Anthropic's and Bedrock's names: they count beside `input_tokens`, not within it.
_BESIDE_PROMPT = frozenset(
    {"cache_read_input_tokens", "cache_creation_input_tokens", "cacheReadInputTokens", "cacheWriteInputTokens"}
)


def _meanings(**names: str) -> Mapping[str, str]:
    return MappingProxyType({name: meaning for meaning, listed in names.items() for name in listed.split()})


_READ = "cached_tokens num_cached_tokens prompt_cache_hit_tokens cachedContentTokenCount cache_read_tokens cache_read"

_WRITTEN = "cache_write_tokens cache_creation_tokens cached_creation_tokens cache_write_input_tokens cache_creation"

_WRITTEN_5M = "ephemeral_5m_input_tokens claude_cache_creation_5_m_tokens"

_WRITTEN_1H = "ephemeral_1h_input_tokens claude_cache_creation_1_h_tokens"

# What a count in `usage` itself means.
_MEANINGS = _meanings(
    prompt="prompt_tokens input_tokens promptTokenCount inputTokens prompt_eval_count",
    output="completion_tokens output_tokens candidatesTokenCount outputTokens eval_count",
    total="total_tokens totalTokenCount totalTokens",
    by_tools="toolUsePromptTokenCount",
    cached=f"{_READ} cache_read_input_tokens cacheReadInputTokens",
    written=f"{_WRITTEN} cache_creation_input_tokens cacheWriteInputTokens",
    written_5m=_WRITTEN_5M,
    written_1h=_WRITTEN_1H,
    reasoning="reasoning_tokens thoughtsTokenCount",
)

_OF_PROMPT_NAMES = _meanings(cached=_READ, written=_WRITTEN, audio_in="audio_tokens", image_in="image_tokens")

_OF_ANSWER_NAMES = _meanings(
    reasoning="reasoning_tokens thinking_tokens reasoning", audio_out="audio_tokens", image_out="image_tokens"
)

_OF_CACHED_NAMES = _meanings(audio_cached="audio_tokens")

_OF_WRITTEN_NAMES = _meanings(written_5m=_WRITTEN_5M, written_1h=_WRITTEN_1H)

# Members that are objects, in `usage` or in one another → what a count in them means. Gemini's are lists.
_DETAILS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        **dict.fromkeys(("prompt_tokens_details", "input_tokens_details", "input_token_details"), _OF_PROMPT_NAMES),
        **dict.fromkeys(("completion_tokens_details", "output_tokens_details"), _OF_ANSWER_NAMES),
        **dict.fromkeys(("output_token_details", "candidatesTokensDetails"), _OF_ANSWER_NAMES),
        **dict.fromkeys(("cached_tokens_details", "cacheTokensDetails"), _OF_CACHED_NAMES),
        **dict.fromkeys(("cache_creation", "cache_creation_token_details"), _OF_WRITTEN_NAMES),
        "promptTokensDetails": _OF_PROMPT_NAMES,
    }
)

# Details of details, as the kinds of cached tokens are.
_MAX_DETAIL_DEPTH = 2

_ELSEWHERE = ("usageMetadata", "usage_metadata")

# Members of a chunk with a `usage` of their own: Groq's, Anthropic's message_start, events of the Responses API.
_WITHIN = ("x_groq", "message", "response")


def usage_of(body: Mapping[str, Any]) -> Any:
    """Return the usage that a completion or a chunk reports, wherever its vendor puts it; None if there is none."""
    if usage := body.get("usage"):
        return usage
    choices = body.get("choices")
    if type(choices) is list and choices:
        choice = choices[0]
        # Most chunks are of the middle of a stream, and are recognised at once.
        if type(choice) is dict and not choice.get("finish_reason") and "usage" not in choice and len(choices) == 1:
            return _usage_beside(body) if "x_groq" in body else None
        for choice in reversed(choices):
            if type(choice) is dict and (usage := choice.get("usage")):
                return usage
    return _usage_beside(body)


def _usage_beside(body: Mapping[str, Any]) -> Any:
    for name in _ELSEWHERE:
        if usage := body.get(name):
            return usage
    for name in _WITHIN:
        if isinstance(part := body.get(name), Mapping) and (usage := part.get("usage")):
            return usage
    return None


def parse_usage(usage: object) -> TokenCounts:
    """Read a report of usage. What is missing or broken in it is None.

    Vendors disagree on two things. Is what a cache read and wrote part of the prompt's count (OpenAI, DeepSeek, Gemini)
    or beside it (Anthropic, Bedrock)? Is reasoning part of the answer's (OpenAI, DeepSeek) or beside it (xAI, Gemini,
    Perplexity)? The total says which, where there is one; else the names do. A part is never larger than its whole.
    """
    if not isinstance(usage, Mapping):
        return NOTHING_REPORTED
    if usage.keys() == _PLAIN_REPORT and (plain := _read_plain(usage)) is not None:
        return plain
    found: dict[str, int] = {}
    _read(usage, _MEANINGS, found, depth=0)
    get = found.get
    if "written_1h" in found:
        found["written"] = max(get("written", 0), get("written_5m", 0) + found["written_1h"])
    if by_tools := get("by_tools"):
        found["prompt"] = get("prompt", 0) + by_tools
    prompt, output = get("prompt"), get("output")
    if not (prompt and output and get("total", prompt + output) == prompt + output and _has_no_parts(found)):
        prompt, output = _whole(usage, found)
        if not get("reasoning") and "output" in found and prompt and output and output > found["output"]:
            # The total has more than the counts: reasoning that is not counted by itself.
            found["reasoning"] = output - found["output"]
    return TokenCounts(
        prompt_tokens=prompt,
        cached_tokens=get("cached"),
        output_tokens=output,
        reasoning_tokens=get("reasoning"),
        written_tokens=get("written"),
        written_1h_tokens=get("written_1h"),
        audio_input_tokens=get("audio_in"),
        cached_audio_tokens=get("audio_cached"),
        image_input_tokens=get("image_in"),
        audio_output_tokens=get("audio_out"),
        image_output_tokens=get("image_out"),
    )


def combine_usage(earlier: object, later: object) -> object:
    """Return what two reports of one answer say together, as a chat client is told; None: there is none.

    That is the later one, unless it lacks the prompt or the answer, and `earlier` has it. Zeros are no report.
    """
    if not earlier or not later:
        return later or earlier or None
    counts = parse_usage(later)
    if counts.prompt_tokens and counts.output_tokens:
        return later
    before = parse_usage(earlier)
    whole = counts.after(before)
    if whole == counts:
        return later
    return earlier if whole == before else _report_of(whole)


def _report_of(counts: TokenCounts) -> dict[str, Any]:
    """Return counts as OpenAI reports them."""
    in_prompt: dict[str, Any] = {
        "cached_tokens": counts.cached_tokens,
        "cache_write_tokens": counts.written_tokens,
        "audio_tokens": counts.audio_input_tokens,
        "image_tokens": counts.image_input_tokens,
    }
    if counts.written_1h_tokens is not None:
        in_prompt["cache_creation_token_details"] = {"ephemeral_1h_input_tokens": counts.written_1h_tokens}
    if counts.cached_audio_tokens is not None:
        in_prompt["cached_tokens_details"] = {"audio_tokens": counts.cached_audio_tokens}
    in_answer = {
        "reasoning_tokens": counts.reasoning_tokens,
        "audio_tokens": counts.audio_output_tokens,
        "image_tokens": counts.image_output_tokens,
    }
    report: dict[str, Any] = {
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.output_tokens,
        "total_tokens": counts.total,
        "prompt_tokens_details": {name: count for name, count in in_prompt.items() if count is not None},
        "completion_tokens_details": {name: count for name, count in in_answer.items() if count is not None},
    }
    return {name: value for name, value in report.items() if value not in (None, {})}


# What servers of OpenAI's format report of most answers.
_PLAIN_REPORT = frozenset({"prompt_tokens", "completion_tokens", "total_tokens"})


def _read_plain(usage: Mapping[str, Any]) -> TokenCounts | None:
    """Read a report of these three alone, quickly; None: they are no whole numbers above 0, or do not add up."""
    prompt, output, total = usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]
    if type(prompt) is not int or type(output) is not int or prompt + output != total:
        return None
    is_plain = 0 < prompt < MAX_TOKENS and 0 < output < MAX_TOKENS
    return TokenCounts(prompt_tokens=prompt, output_tokens=output) if is_plain else None


def _has_no_parts(found: Mapping[str, int]) -> bool:
    return not (found.get("cached") or found.get("written") or found.get("reasoning"))


def _read(usage: Mapping[str, Any], names: Mapping[str, str], found: dict[str, int], depth: int) -> None:
    """Add each count under its meaning: the largest, since it may stand in several places, in some of them as zero."""
    for name, value in usage.items():
        if type(value) is int or type(value) is float:
            meaning = names.get(name)
            if meaning is not None and (count := _count(value)) is not None and count >= found.get(meaning, 0):
                found[meaning] = count
        elif value and (inner := _DETAILS.get(name)) is not None and depth < _MAX_DETAIL_DEPTH:
            if isinstance(value, list):
                value = _modes(value)
            if isinstance(value, Mapping):
                _read(value, inner, found, depth + 1)


def _modes(listed: list[Any]) -> Mapping[str, Any]:
    """Turn Gemini's list of modalities into OpenAI's details."""
    return {
        f"{part['modality'].lower()}_tokens": part.get("tokenCount")
        for part in listed
        if isinstance(part, Mapping) and isinstance(part.get("modality"), str)
    }


def _whole(usage: Mapping[str, Any], found: Mapping[str, int]) -> tuple[int | None, int | None]:
    """Return all tokens of the prompt and all of the answer."""
    prompt, output, total = found.get("prompt"), found.get("output"), found.get("total", 0)
    cache, reasoning = found.get("cached", 0) + found.get("written", 0), found.get("reasoning", 0)
    if not prompt:
        # All of it came from a cache, or only the total is known.
        return max(total - output if output else 0, cache) or prompt, _answer(output, reasoning)
    # More cached than the prompt has, or Anthropic's names: the cache is not in the prompt's count.
    beside = cache > prompt or (not _count(usage.get("prompt_tokens")) and not _BESIDE_PROMPT.isdisjoint(usage))
    if output is None and total <= prompt:
        return prompt + (cache if beside else 0), _answer(output, reasoning)
    return _agreeing(prompt, output or 0, total, cache, reasoning, beside=beside)


def _agreeing(prompt: int, output: int, total: int, cache: int, reasoning: int, *, beside: bool) -> tuple[int, int]:
    """Return prompt and answer by the convention whose sum is the total, else by what the names say (`beside`)."""
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
    """Return the answer's tokens, with the reasoning if that is too large to be a part of them."""
    return (output or 0) + reasoning if reasoning > (output or 0) else output


def _count(value: object) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_TOKENS else None


_parts_of = attrgetter(
    "cached_tokens",
    "reasoning_tokens",
    "written_tokens",
    "audio_input_tokens",
    "cached_audio_tokens",
    "image_input_tokens",
    "audio_output_tokens",
    "image_output_tokens",
)


def buckets_of(counts: TokenCounts) -> TokenUsage:
    """Make the counts disjoint. None is larger than what is left of its whole; an unknown whole is empty."""
    prompt, output = counts.prompt_tokens or 0, counts.output_tokens or 0
    all_cached, all_reasoning, *others = _parts_of(counts)
    cached = min(all_cached or 0, prompt)
    if not any(others):
        reasoning = min(all_reasoning or 0, output)
        return TokenUsage(prompt - cached, cached, output - reasoning, reasoning_tokens=reasoning)
    written = min(counts.written_tokens or 0, prompt - cached)
    written_1h = min(counts.written_1h_tokens or 0, written)
    left = prompt - cached - written
    cached_audio = min(counts.cached_audio_tokens or 0, cached)
    audio_in = min(max((counts.audio_input_tokens or 0) - cached_audio, 0), left)
    images_in = min(counts.image_input_tokens or 0, left - audio_in)
    reasoning = min(all_reasoning or 0, output)
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
    """Return the cost of what was reported, each token paid once; None if the price, prompt or answer is unknown."""
    if price is None or counts.prompt_tokens is None or counts.output_tokens is None:
        return None
    return bill_usd(price, buckets_of(counts))


@frozen
class ObservedTraffic:
    """What this process saw of a request, whatever its model reported."""

    prompt_tokens: int
    """Estimated from the request."""
    output_bytes: int
    """UTF-8, of the answer as far as it arrived."""
    unreported_bytes: int | None = None
    """Of these, what came after the last report of usage. None: all."""
    has_content: bool = False
    """Content arrived, even if it has no bytes of text."""

    @property
    def output_tokens(self) -> int:
        return -(-self.output_bytes // BYTES_PER_TOKEN)


@frozen
class Cost:
    usd: float | None
    """None: the price is not known."""
    estimated: bool = False


def plausible_usage(counts: TokenCounts, received: ObservedTraffic) -> TokenCounts:
    """Return the report as far as it is plausible, with None for the rest.

    A prompt has tokens, and so has a text: some servers send zeros while they have not counted yet. A report in the
    middle of a stream does not cover what came after it: if the bytes of the whole answer make more tokens than it
    counts, it no longer holds. The last report, at the end, always holds.
    """
    prompt, output = counts.prompt_tokens or None, counts.output_tokens
    rest = received.output_bytes if received.unreported_bytes is None else received.unreported_bytes
    too_few = output is not None and rest > 0 and output < received.output_tokens
    if too_few or (not output and (received.output_bytes or received.has_content)):
        output = None
    if prompt == counts.prompt_tokens and output == counts.output_tokens:
        return counts
    return replace(counts, prompt_tokens=prompt, output_tokens=output)


def cost_of(counts: TokenCounts, price: Price | None, received: ObservedTraffic, *, billed: bool) -> Cost:
    """Return the cost, estimated if usage is missing.

    Args:
        billed: the model began to answer, as far as is known. One that refused or was not reached costs nothing.
    """
    reported = cost_usd(counts, price)
    if reported is not None:
        return Cost(reported)
    if not billed:
        return Cost(0.0)
    if price is None:
        return Cost(None)
    estimated = replace(
        counts,
        prompt_tokens=received.prompt_tokens if counts.prompt_tokens is None else counts.prompt_tokens,
        output_tokens=received.output_tokens if counts.output_tokens is None else counts.output_tokens,
    )
    return Cost(bill_usd(price, buckets_of(estimated)), estimated=True)
