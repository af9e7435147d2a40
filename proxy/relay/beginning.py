"""A model's stream from its first event to its first content, and what is left of it. Asks nobody."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from time import monotonic

from proxy.errors import UpstreamFailure
from proxy.recording.meter import Meter
from proxy.relay.silence import Silence
from proxy.relay.turns import Turn
from proxy.storage.usage import usage_of
from proxy.upstream.client import Blocks
from proxy.upstream.payload import Payload, has_content, is_empty_answer, is_finished
from proxy.upstream.sse import dump

MOST_HELD = 1000
"""Chunks without content that are kept until the first with some, to be shown before it; more of them are dropped, and
time alone is the limit. As many again are kept that end a choice or report usage."""
MOST_HELD_BYTES = 2**20
"""Of all of them."""


@dataclass
class OpenStream:
    """A stream that has begun: what was read while waiting for content, and the rest."""

    rest: Blocks
    turn: Turn
    idle_s: float
    """How long the rest may be silent."""
    until: float
    """Monotonic seconds at which it is given up, however lively it is."""
    held: list[Payload] = field(default_factory=list)
    ended: bool = False
    """Nothing is left to read, and it ended well."""

    @property
    def is_empty(self) -> bool:
        """It ended without a word, and nothing kept it from speaking."""
        return self.ended and is_empty_answer(
            {"choices": [choice for chunk in self.held for choice in chunk.body.get("choices") or ()]}
        )

    async def __aiter__(self) -> AsyncIterator[list[Payload]]:
        """Blocks of chunks. Raises UpstreamFailure where it breaks, stops, or goes on for too long."""
        held, self.held = self.held, []
        if held:
            yield held
        silence = Silence(self.idle_s, self.until)
        try:
            while not self.ended:
                yield await silence.during(anext(self.rest))
        except StopAsyncIteration:
            self.turn.answered()
        except TimeoutError:
            self.turn.failed(failure := self._too_slow())
            raise failure from None
        except UpstreamFailure as failure:
            self.turn.failed(failure)
            raise
        finally:
            silence.close()

    def _too_slow(self) -> UpstreamFailure:
        reason = f"was silent for {self.idle_s:g} s (idle_timeout_s)"
        if monotonic() >= self.until:
            reason = "took longer than stream_timeout_s"
        return UpstreamFailure(f"the model's stream {reason}", timed_out=True)

    async def aclose(self) -> None:
        self.turn.close()
        await self.close_rest()

    async def close_rest(self) -> None:
        """The upstream's connection alone: how the turn ended is told by whoever knows."""
        close = getattr(self.rest, "aclose", None)
        if close is not None:
            await close()


async def begin(stream: OpenStream, meter: Meter) -> OpenStream:
    """Reads up to the first content, or to the end if there is none. Where that fails it closes the connection, and
    leaves the turn to the caller: a limit that cuts this off is known out there, as a failure of the model."""
    held = _Held()
    try:
        async for block in stream.rest:
            start = _first_content(block, meter)
            held.add(block[:start])
            if start < len(block):
                stream.held = held.chunks + block[start:]
                stream.turn.begun()
                return stream
    except BaseException:
        await stream.close_rest()
        raise
    stream.held, stream.ended = held.chunks, True
    stream.turn.answered()
    return stream


class _Held:
    """Chunks without content, as many as can be kept."""

    def __init__(self) -> None:
        self.chunks: list[Payload] = []
        self._bytes = 0

    def add(self, block: list[Payload]) -> None:
        for chunk in block:
            most = 2 * MOST_HELD if usage_of(chunk.body) or is_finished(chunk.body) else MOST_HELD
            if len(self.chunks) >= most or self._bytes >= MOST_HELD_BYTES:
                continue
            self._bytes += len(chunk.raw if chunk.raw is not None else dump(chunk.body))
            if self._bytes < MOST_HELD_BYTES:
                self.chunks.append(chunk)


def _first_content(block: list[Payload], meter: Meter) -> int:
    """Its place; that behind the last where none has any."""
    for chunk in block:
        if usage := usage_of(chunk.body):
            meter.used(usage)
    return next((place for place, chunk in enumerate(block) if has_content(chunk.body)), len(block))
