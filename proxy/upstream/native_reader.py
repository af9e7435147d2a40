from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proxy.errors import ResponseTooLarge, UpstreamError
from proxy.json_text import MAX_VALUES_AT_ONCE, SMALL_BYTES, JSONTooLarge
from proxy.settings.model_config import NativeAPI
from proxy.upstream.chunk_reader import (
    NOT_JSON,
    REPORTED,
    ChunkReader,
    Parse,
    event_too_large,
    is_stream_line,
    parse_error,
)
from proxy.upstream.completion_reader import AnswerBody
from proxy.upstream.errors import error_from_body, find_error, not_a_completion
from proxy.upstream.native_chunks import messages_completion, new_chunks, reported_error, responses_completion
from proxy.upstream.native_events import events_of, new_builder
from proxy.upstream.payload import JSONPayload, NativePayload, parse, parse_exact, parse_in_thread, reparse
from proxy.upstream.response_memory import JSONBody, ResponseBounds, ResponseMemory
from proxy.upstream.sse import ErrorData, RawLine, SSEDecoder, TypedData

# Values of `status` of a response that is not complete, and will not be in this body.
_UNFINISHED = ("failed", "cancelled", "in_progress", "queued")

# The member of a whole answer that holds what the model wrote.
_CONTENT: Mapping[NativeAPI, str] = {"messages": "content", "responses": "output"}


class NativeReader(ChunkReader):
    """Turn the bytes of a stream of another API into its events, each with a chunk that says the same.

    The stream is over with the event that ends an answer in that API. Whatever comes after it is not read. A whole
    answer becomes the events of it.
    """

    def __init__(
        self,
        api: NativeAPI,
        parse: Parse = parse,
        *,
        memory: ResponseMemory | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(parse, memory=memory, headers=headers)
        self._api = api
        self._chunks = new_chunks(api, headers)
        self._frames_left = 0  # the events are those of another API

    def _new_decoder(self) -> SSEDecoder:
        return SSEDecoder(self._memory.max_response_bytes, typed=True)

    def _is_finished(self) -> bool:
        return self._chunks.ended

    def break_off(self) -> bool:
        return self.finished

    def _read_whole(self, completion: Any, data: bytes, body: JSONBody) -> list[JSONPayload]:
        try:
            _completion(self._api, "the model", completion, self._headers)
        except UpstreamError as error:
            return self._fail(error)
        self.started, self._json = True, None
        block: list[JSONPayload] = [
            NativePayload(self._chunks.chunk(event), None, body.bounds.held, event, event["type"].encode())
            for event in events_of(self._api, reparse(data, completion))
        ]
        self.finished = self._is_finished()
        return block

    def _read_event(self, event: bytes, block: list[JSONPayload]) -> None:
        """Append an event to the block. Raises UpstreamError."""
        data = event.strip()
        stated = event.event_type if isinstance(event, TypedData) else b""
        if type(event) is ErrorData or stated.lower().endswith(b"error"):
            raise error_from_body(REPORTED, parse_error(data), self._headers)
        if not data or data == b"[DONE]" or (type(event) is RawLine and not is_stream_line(data)):
            return
        value, raw = self._parse_object(data)
        if "type" not in value and find_error(value) is not None:
            raise reported_error(value, self._headers)
        chunk = self._chunks.chunk(value)
        self._append(NativePayload(chunk, raw, native=value, event_type=stated or _type_of(value)), len(data), block)
        self.done = self._chunks.ended

    def _parse_object(self, data: bytes) -> tuple[dict[str, Any], bytes | None]:
        try:
            value, raw = self._parse(data)
        except JSONTooLarge as error:
            raise event_too_large(error) from error
        except ValueError as error:
            raise UpstreamError(NOT_JSON) from error
        if not isinstance(value, dict):
            raise UpstreamError("the model sent an event that is not a JSON object")
        return value, raw


def _type_of(value: Mapping[str, Any]) -> bytes:
    """Return the type that the data of an event states: clients look for it in a line of its own."""
    stated = value.get("type")
    return stated.encode() if isinstance(stated, str) and stated.isascii() and stated.isprintable() else b""


class NativeAnswerReader(AnswerBody):
    """Turn the bytes of a response into one whole answer of another API. A stream of events is put together."""

    def __init__(
        self, api: NativeAPI, model: str, bounds: ResponseBounds, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(bounds)
        self._api = api
        self._model = model
        self._headers = headers
        self._builder = new_builder(api)

    def _new_event_reader(self) -> NativeReader:
        return NativeReader(self._api, parse_exact, memory=self._event_memory(), headers=self._headers)

    def _add_chunks(self, block: list[JSONPayload]) -> None:
        for each in block:
            assert isinstance(each, NativePayload)
            self._builder.add(each.native)

    async def answer_in_thread(self) -> NativePayload:
        """Return the answer, once all of the body has come. Parse a large one in a thread. Raises UpstreamError."""
        if self._events is not None:
            self._end_events(self._events)
            return self._payload(self._builder.answer(), None)
        data = self._take_data()
        try:
            if self._bounds.values > MAX_VALUES_AT_ONCE:
                value, raw = await parse_in_thread(data)
            else:
                value, raw = parse(data, checked=len(data) > SMALL_BYTES)
        except JSONTooLarge as error:
            raise ResponseTooLarge(f"the model's answer {error}") from error
        except ValueError:
            raise not_a_completion(self._model, data, self._headers) from None
        return self._payload(value, raw)

    def _payload(self, value: Any, raw: bytes | None) -> NativePayload:
        completion = _completion(self._api, self._model, value, self._headers)
        return NativePayload(completion, raw, self._bounds.held, value)


def _completion(api: NativeAPI, model: str, value: Any, headers: Mapping[str, str] | None) -> dict[str, Any]:
    """Return a parsed body as a completion. Raises UpstreamError if it is no answer in this API, or an error."""
    if not isinstance(value, dict):
        raise not_a_completion(model, value, headers)
    if api == "responses" and value.get("status") in _UNFINISHED:
        raise reported_error({"response": value}, headers)
    if not isinstance(value.get(_CONTENT[api]), list) or _states_error(value):
        raise not_a_completion(model, value, headers)
    return messages_completion(value) if api == "messages" else responses_completion(value)


def _states_error(value: Mapping[str, Any]) -> bool:
    return find_error({"error": value.get("error"), "type": value.get("type")}) is not None
