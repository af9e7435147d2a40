from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from time import monotonic
from typing import Any

from proxy.concurrency import cancel_and_wait
from proxy.errors import CannotTranslate, UpstreamError
from proxy.outbound import Outbound
from proxy.settings.schema import Settings
from proxy.storage.models import ModelRecord, ResolvedProvider
from proxy.upstream.answer_room import AnswerRoom
from proxy.upstream.litellm.client import LiteLLMClient
from proxy.upstream.openai_client import OpenAIClient, UpstreamRequest
from proxy.upstream.payload import JSONPayload
from proxy.upstream.provider_resolution import resolve_static
from proxy.upstream.stream_options import StreamOptions

log = logging.getLogger("uniroute.upstream")

FIRST_PAUSE_S = 10.0

MAX_PAUSE_S = 300.0
"""Between two attempts to import litellm."""

Blocks = AsyncIterator[list[JSONPayload]]
"""Chunks of a stream, those together that came together."""


class UpstreamClient:
    """One per process, on one event loop. litellm is imported when a model first needs it, in a thread."""

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        outbound = Outbound(environ)
        for problem in outbound.problems():
            log.warning("environment: %s", problem)
        self.room = AnswerRoom(settings.max_answer_bytes, settings.max_answers_in_flight_bytes)
        self._relay = OpenAIClient(settings, environ, outbound, self.room)
        self._translate = LiteLLMClient(settings, environ, self.room, outbound)
        self._stream_options = StreamOptions()
        self._loading: asyncio.Task[None] | None = None
        self._tried = asyncio.Event()
        """litellm was imported, or could not be."""
        self._failed: str | None = None
        """Why it could not, the last time."""
        self._next_try = 0.0
        self._translated: frozenset[str] = frozenset()

    async def complete(
        self,
        record: ModelRecord,
        body: Mapping[str, Any],
        headers: Mapping[str, str] | None = None,
        *,
        raw: bytes | None = None,
        connect_s: float | None = None,
    ) -> JSONPayload:
        """The whole answer in OpenAI's format.

        Args:
            raw: what `body` was parsed from, if all of it is for the upstream: then it goes there as it is.

        Raises:
            UpstreamFailure: there is none.
        """
        resolved = is_direct(record)
        if resolved is not None:
            return await self._relay.complete(UpstreamRequest(record, resolved, body, headers or {}, raw, connect_s))
        await self.loaded()
        return JSONPayload(await self._translate.complete(record, body, headers, connect_s=connect_s))

    async def stream(
        self,
        record: ModelRecord,
        body: Mapping[str, Any],
        headers: Mapping[str, str] | None = None,
        *,
        raw: bytes | None = None,
        connect_s: float | None = None,
    ) -> Blocks:
        """Chunks in OpenAI's format, the last with usage and no choices. Close it to close the upstream's connection.

        Raises:
            UpstreamFailure: here if the upstream refused, later where the stream breaks or ends without its end.
        """
        try:
            return await self._stream(record, body, headers or {}, raw, connect_s)
        except UpstreamError as failure:
            if not self._stream_options.are_in_doubt(record, failure):
                raise
        stream = await self._stream(record, body, headers or {}, raw, connect_s, without_options=True)
        self._stream_options.were_refused(record)
        return stream

    async def _stream(
        self,
        record: ModelRecord,
        body: Mapping[str, Any],
        headers: Mapping[str, str],
        raw: bytes | None,
        connect_s: float | None,
        *,
        without_options: bool = False,
    ) -> Blocks:
        asks_usage = not without_options and self._stream_options.are_sent_to(record)
        resolved = is_direct(record)
        if resolved is not None:
            call = UpstreamRequest(record, resolved, body, headers, raw, connect_s, asks_usage)
            return await self._relay.stream(call)
        await self.loaded()
        return _as_blocks(
            await self._translate.stream(record, body, headers, connect_s=connect_s, asks_usage=asks_usage)
        )

    async def open(self) -> None:
        """Whatever the first request would wait for otherwise. litellm only where a model needs it."""
        if self._loading is not None:
            await self._tried.wait()

    def serve(self, models: Mapping[str, ModelRecord]) -> None:
        """These are the models from now on."""
        self._relay.targets.retain(models)
        self._stream_options.retain(models)
        self._translated = frozenset(name for name, record in models.items() if is_direct(record) is None)
        if self._loading is None and self._translated:
            log.info("loading litellm, for models of other formats than OpenAI's")
            self._load()

    async def loaded(self) -> None:
        """Return once translation is there. Raises CannotTranslate while litellm cannot be imported."""
        if self._translate.ready:
            return
        if self._loading is None:
            self._load()
        await self._tried.wait()
        if self._failed is not None:
            raise CannotTranslate(f"{self._failed}; it is tried again", max(1.0, self._next_try - monotonic()))

    def _load(self) -> None:
        self._loading = asyncio.create_task(self._try_until_loaded(), name="uniroute-litellm")

    async def _try_until_loaded(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._translate.ready:
            try:
                await self._translate.prepare()
                self._failed = None
            except Exception as error:
                # of half a million lines that are not ours: for want of memory, files or descriptors, all of which end
                self._failed = f"litellm cannot be imported ({type(error).__name__}: {error})"[:300]
                log.exception(
                    "%s: models of other formats than OpenAI's cannot be called; it is tried again in %g s",
                    *(self._failed, pause_s),
                )
                self._next_try = monotonic() + pause_s
            self._tried.set()
            if self._failed is not None:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_PAUSE_S)

    @property
    def loading(self) -> frozenset[str]:
        """Models that could not be called now: they are called once litellm is there."""
        return frozenset() if self._translate.ready else self._translated

    async def aclose(self) -> None:
        await cancel_and_wait(self._loading)
        await self._relay.aclose()
        await self._translate.aclose()


def is_direct(record: ModelRecord) -> ResolvedProvider | None:
    """What it was resolved to, if it is relayed."""
    resolved = record.resolved or resolve_static(record.litellm_params, record.info.forward)
    return resolved if resolved is not None and resolved.mode == "relay" else None


async def _as_blocks(chunks: AsyncGenerator[dict[str, Any]]) -> AsyncGenerator[list[JSONPayload]]:
    async with aclosing(chunks):
        async for chunk in chunks:
            yield [JSONPayload(chunk)]
