from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.errors import UpstreamError
from proxy.upstream.chunk_reader import ChunkReader
from proxy.upstream.openai_client import UpstreamChunks
from proxy.upstream.sse import ErrorData, RawLine, SSEDecoder
from tests.support.chunk_streams import PulledBlocks, one_by_one
from tests.support.connection_pool import FedInPieces

CONTENT_CHUNK: Any = {"model": "m", "choices": [{"index": 0, "delta": {"content": "é\u2028字"}, "finish_reason": None}]}
END: Any = {"model": "m", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
ODD: list[Any] = [
    *({"choices": None}, {"choices": [{"delta": None}]}, {"choices": 5}, {"choices": [None]}, {"choices": []}, {}),
    *(7, None, [], {"error": {"message": "boom"}}, {"error": None, "choices": []}, {"big": 10**40, "choices": None}),
    {"choices": [], "usage": {"total_tokens": 1}},
    {"choices": [{"index": 1, "delta": {"content": "b"}}]},
    {"choices": [{"delta": {}, "usage": {"total_tokens": 1}}]},
    {"choices": [{"delta": {}, "finish_reason": "error"}]},
    {"object": "error", "message": "boom"},
]
LINES = st.sampled_from(
    [
        *(
            b"data: " + json.dumps(each, ensure_ascii=False).encode()
            for each in [CONTENT_CHUNK, CONTENT_CHUNK, CONTENT_CHUNK, END, *ODD]
        ),
        *(
            b"data:" + json.dumps(CONTENT_CHUNK).encode(),
            b"data: [DONE]",
            b"data:[DONE]",
            b"data:",
            b"data: ",
            b"data:  7",
        ),
        *(b"data: NaN", b'data: {"choices": [], "x": NaN}', b'data: {"choices": [], "x": "\\ud83d"}', b"data: {"),
        *(
            b": ping",
            b"event: error",
            b"id: 1",
            b"nonsense",
            b"",
            b"\r",
            b"\xef\xbb\xbfdata: 1",
            b"data: \xff",
            b" data: 1",
        ),
        *(
            b'data: {"choices":',
            b"data: []}",
            b"event: ping",
            b'error: {"code": 400}',
            b'{"error": {"code": 429}}',
            b"{",
        ),
        json.dumps(CONTENT_CHUNK).encode(),
    ]
)
ENDS = st.sampled_from([b"\n\n", b"\n\n", b"\n\n", b"\n", b"\r\n\r\n", b"\n\n\n", b"\r\n", b"\n\r\n", b""])
STREAMS = st.lists(st.tuples(LINES, ENDS), max_size=10).map(
    lambda parts: b": hello\n" + b"".join(line + end for line, end in parts)
)


@st.composite
def pieces(draw: st.DrawFn, raw: bytes) -> list[bytes]:
    cuts = sorted(draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    return [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]


class Slow(SSEDecoder):
    """Read a stream by lines alone."""

    def feed(self, piece: bytes) -> list[bytes]:
        return self._decode_lines(piece)


def cut(cutter: SSEDecoder, parts: Sequence[bytes]) -> list[bytes]:
    return [data for part in parts for data in cutter.feed(part)] + cutter.close()


def typed(found: list[bytes]) -> list[tuple[type, bytes]]:
    return [(type(data), data) for data in found]


@given(STREAMS | st.text("da:t \n\r{\ufeff", max_size=80).map(str.encode), st.data())
@settings(max_examples=500, deadline=None)
@example(b"data: a\n\ndata: b\r\n\ndata: c\n\n", None)
@example(b"data: a\n\ndata: b\n\n: c\n\n\ndata: d\ndata: e\n\ndata: f", None)
def test_the_fast_decoder_gives_the_same_events_as_decoding_by_lines(raw: bytes, data: st.DataObject | None) -> None:
    expected = typed(cut(Slow(), [raw]))
    splits = [[raw], [bytes((byte,)) for byte in raw], *([raw[:at], raw[at:]] for at in range(min(len(raw), 60)))]
    if data is not None:
        splits.append(data.draw(pieces(raw)))

    assert all(typed(cut(SSEDecoder(), split)) == expected for split in splits)


def spelled_out(raw: bytes) -> tuple[list[Any], tuple[Any, ...] | None]:
    """Return the chunks of a stream and its error, event by event of its lines."""
    found: list[Any] = []
    begun, ended = set[int](), set[int]()
    cutter = Slow()
    events, last = cutter.feed(raw), cutter.close()
    try:
        done = read_all(events, found, begun, ended)
        whole = bool(begun) and begun == ended
        try:
            done = done or read_all(last, found, begun, ended)
        except UpstreamError as failure:
            if not (whole and "not JSON" in failure.message):  # half an event behind the end of the answer
                raise
    except UpstreamError as failure:
        return found, fields_of(failure)
    whole = bool(begun) and (done or begun == ended)
    return found, None if whole else fields_of(UpstreamError("the model's stream ended before its answer did"))


def read_all(events: list[bytes], found: list[Any], begun: set[int], ended: set[int]) -> bool:
    """Read all and tell whether [DONE] came."""
    while events:
        event = events.pop(0)
        data = bytes(event).strip()
        if isinstance(event, ErrorData):
            raise an_error(or_text(data), status=502)
        if isinstance(event, RawLine) and not isinstance(or_text(data), dict):
            continue
        if data == b"[DONE]":
            return True
        if not data:
            continue
        if or_text(data) is data and b"\n" in data:
            events[:0] = data.split(b"\n")
            continue
        found.append(a_chunk(data))
        for place, choice in enumerate(found[-1]["choices"]):
            index = choice.get("index", place)
            begun.add(index)
            if choice.get("finish_reason"):
                ended.add(index)
    return False


def or_text(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data


def an_error(reported: Any, *, status: int) -> UpstreamError:
    if isinstance(reported, bytes):
        reported = reported.decode("utf-8", "replace")
    inner = reported.get("error", reported) if isinstance(reported, dict) else reported
    status = inner.get("code", status) if isinstance(inner, dict) else status
    body = reported if isinstance(reported, dict) and says_that_it_failed(reported) else {"error": reported}
    return UpstreamError("the model reported an error within its stream", status=status, body=body)


def says_that_it_failed(reported: dict[str, Any]) -> bool:
    return bool(reported.get("error") or reported.get("object") == "error" or ends_in_an_error(reported.get("choices")))


def ends_in_an_error(choices: Any) -> bool:
    return any(isinstance(choice, dict) and choice.get("finish_reason") == "error" for choice in as_list(choices))


def a_chunk(data: bytes) -> Any:
    try:
        chunk = json.loads(data)
    except ValueError:
        raise UpstreamError("the model sent an event that is not JSON") from None
    if not isinstance(chunk, dict):
        raise UpstreamError("the model sent an event that is not a JSON object")
    if chunk.get("error") or chunk.get("object") == "error":
        raise an_error(chunk, status=502)
    choices = chunk["choices"] = [] if chunk.get("choices") is None else chunk["choices"]
    if ends_in_an_error(choices):
        raise an_error({"error": {"message": "the model's answer ended with finish_reason 'error'"}}, status=502)
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise UpstreamError("the model sent a chunk whose `choices` are not a list of objects")
    for choice in choices:
        if choice.get("delta") is None:
            choice["delta"] = {}
        if "usage" in choice:
            chunk["usage"] = choice["usage"]
    return chunk


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def streamed(parts: Sequence[bytes]) -> tuple[list[Any], tuple[Any, ...] | None]:
    response: Any = FedInPieces(parts)

    async def read() -> tuple[list[Any], tuple[Any, ...] | None]:
        found: list[Any] = []
        try:
            async for block in PulledBlocks(UpstreamChunks(response, ChunkReader(), ())):
                found += [chunk.body for chunk in block]
        except UpstreamError as failure:
            return found, fields_of(failure)
        return found, None

    return asyncio.run(read())


def fields_of(failure: UpstreamError) -> tuple[Any, ...]:
    return failure.message, failure.status, failure.body, failure.connection_lost, failure.retryable


def relayed(parts: Sequence[bytes]) -> tuple[list[Any], tuple[Any, ...] | None]:
    reader, left = ChunkReader(), [part for part in parts if part]
    found: list[Any] = []
    while not reader.done:
        block = reader.feed(left.pop(0)) if left else reader.close()
        events = [chunk.with_model("m") for chunk in one_by_one(block)]
        assert not any(b"\n" in event or b"\r" in event for event in events), "a client would read on at another line"
        found += map(json.loads, events)
    return found, None if reader.final_error is None else fields_of(reader.final_error)


def nan_as_null(chunks: list[Any]) -> list[Any]:
    """Replace NaN by null, as the proxy does: NaN is no JSON."""
    return [json.loads(json.dumps({**chunk, "model": "m"}).replace("NaN", "null")) for chunk in chunks]


@given(STREAMS, st.data())
@settings(max_examples=300, deadline=None)
@example(b'data: {"model":"m","choices":\ndata: []}\n\ndata: {"model":"m","choices":\rdata:[]}\n\n', None)
@example(b'data: {"choices":[{"index":0}]}\ndata: {"choices":[{"finish_reason":"stop"}]}\ndata: [DONE]\n', None)
@example(b'event: error\ndata: {"choices":[{"delta":{},"finish_reason":"error"}]}\n\n', None)
def test_a_stream_is_read_as_the_reference_reads_it(raw: bytes, data: st.DataObject | None) -> None:
    parts = [raw] if data is None else data.draw(pieces(raw))
    chunks, failure = spelled_out(raw)

    assert relayed(parts) == (nan_as_null(chunks), failure)
    found, fault = streamed(parts)
    assert (nan_as_null(found), fault) == (nan_as_null(chunks), failure)
