"""How the chunks of a stream come: they are pushed to a receiver, in the callback that brings bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

from proxy.concurrency import cancel_until_done
from proxy.upstream.payload import JSONPayload


class ChunkReceiver(Protocol):
    """What takes the chunks of one stream."""

    def receive(self, block: list[JSONPayload]) -> None:
        """Take chunks that arrived together, at least one. Raises nothing. May tell the source to hold."""

    def end(self, error: Exception | None) -> None:
        """Note that no more comes. `error`: UpstreamError if the stream broke, or ended before its answer did."""


class ChunkSource(Protocol):
    """A stream of chunks. Close it, however it ended."""

    def start(self, receiver: ChunkReceiver) -> None:
        """Give the receiver what has arrived, and then what arrives. It may be told all of it, and the end, at once."""

    def hold(self) -> None:
        """Give the receiver no more chunks, until `resume` is called. The end may still be told."""

    def resume(self) -> None: ...

    async def aclose(self) -> None:
        """Close the upstream's connection; the receiver is told nothing more. May be called again."""


class PulledChunks:
    """A source whose chunks are pulled out of an iterator, in a task of its own."""

    def __init__(self, chunks: AsyncIterator[list[JSONPayload]]) -> None:
        """`chunks`: raises UpstreamError. It has an `aclose`."""
        self._chunks = chunks
        self._pulling: asyncio.Task[None] | None = None
        self._goes_on = asyncio.Event()

    def start(self, receiver: ChunkReceiver) -> None:
        self._goes_on.set()
        self._pulling = asyncio.create_task(self._pull(receiver), name="uniroute-chunks")

    def hold(self) -> None:
        self._goes_on.clear()

    def resume(self) -> None:
        self._goes_on.set()

    async def aclose(self) -> None:
        try:
            if self._pulling is not None:
                await cancel_until_done((self._pulling,))
        finally:
            await self._chunks.aclose()  # type: ignore[attr-defined]

    async def _pull(self, receiver: ChunkReceiver) -> None:
        error: Exception | None = None
        try:
            async for block in self._chunks:
                receiver.receive(block)
                await self._goes_on.wait()
        except Exception as failure:  # noqa: BLE001  it is raised where the chunks are waited for
            error = failure
        receiver.end(error)
