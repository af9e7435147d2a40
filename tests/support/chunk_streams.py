from __future__ import annotations

import asyncio
from collections import deque

from proxy.upstream.chunk_reader import ChunkSource
from proxy.upstream.payload import JSONPayload
from proxy.upstream.text_frame import TextRun


class PulledBlocks:
    """An iterator over the blocks of a source, each chunk of text by itself. Close it, however it ended."""

    def __init__(self, source: ChunkSource) -> None:
        self._source = source
        self._blocks: deque[list[JSONPayload]] = deque()
        self._started = self._ended = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> PulledBlocks:
        return self

    async def __anext__(self) -> list[JSONPayload]:
        while not self._blocks:
            if self._ended:
                raise self._error or StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            if self._started:
                self._source.resume()
            else:
                self._started = True
                self._source.start(self)
            if not self._blocks and not self._ended:
                await self._waiter
        return one_by_one(self._blocks.popleft())

    async def aclose(self) -> None:
        await self._source.aclose()

    def receive(self, block: list[JSONPayload]) -> None:
        self._blocks.append(block)
        self._source.hold()
        self._wake()

    def end(self, error: Exception | None) -> None:
        self._ended, self._error = True, error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def one_by_one(block: list[JSONPayload]) -> list[JSONPayload]:
    """Return the chunks of a block, with those of a run one by one."""
    return [each for chunk in block for each in (chunk.chunks() if isinstance(chunk, TextRun) else (chunk,))]
