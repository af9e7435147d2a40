"""What a request cost, by the usage that was reported, else by what went out and came back. No I/O."""

from __future__ import annotations

from dataclasses import dataclass, replace

from proxy.recording.usage import TokenCounts, buckets_of, cost_usd
from router_core.pricing import bill_usd
from router_core.tokens import BYTES_PER_TOKEN
from router_core.types import Price


@dataclass(frozen=True, slots=True)
class Received:
    """What is known of a request beside what its model reported."""

    prompt_tokens: int
    """As estimated from the request."""
    output_bytes: int
    """UTF-8, of the answer as far as it came."""
    unreported_bytes: int | None = None
    """Of these, those that came after the last report of usage. None: all."""
    has_content: bool = False
    """Something came, if not in bytes of text."""

    @property
    def output_tokens(self) -> int:
        return -(-self.output_bytes // BYTES_PER_TOKEN)


@dataclass(frozen=True, slots=True)
class Cost:
    usd: float | None
    """None: the price is not known."""
    estimated: bool = False


def believed(counts: TokenCounts, received: Received) -> TokenCounts:
    """The report as far as it can be true. The rest of it is None.

    Nobody answers a prompt without tokens, and no text has none: such zeros are what some servers send while they have
    not counted yet. A report in the middle of a stream says nothing of what came after it: where the bytes of the whole
    answer make more tokens than it counts, it is no longer what was used. The last report, at the end, always is.
    """
    prompt, output = counts.prompt_tokens or None, counts.output_tokens
    rest = received.output_bytes if received.unreported_bytes is None else received.unreported_bytes
    too_few = output is not None and rest > 0 and output < received.output_tokens
    if too_few or (not output and (received.output_bytes or received.has_content)):
        output = None
    if prompt == counts.prompt_tokens and output == counts.output_tokens:
        return counts
    return replace(counts, prompt_tokens=prompt, output_tokens=output)


def cost_of(counts: TokenCounts, price: Price | None, received: Received, *, billed: bool) -> Cost:
    """`billed`: the model began, as far as is known. One that refused, or could not be reached, costs nothing."""
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
