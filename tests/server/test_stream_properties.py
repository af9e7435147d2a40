from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.errors import UpstreamError
from proxy.json_text import encode_json
from proxy.upstream.chunk_reader import ChunkReader
from proxy.upstream.openai_client import UpstreamChunks
from proxy.upstream.sse import SSEDecoder, format_event
from tests.support.chunk_streams import PulledBlocks
from tests.support.connection_pool import FedInPieces

LINE_ENDS = st.sampled_from(["\n", "\r\n"])
TEXTS = st.text(st.sampled_from('a字é😀\u2028\u2029\x85\x0b\x0c\ufeff:\\" \t\u0301'), max_size=12)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    """Draw a stream as servers write it, and the data of its events."""
    text = draw(st.sampled_from(["", "\ufeff"]))
    events: list[bytes] = []
    for payload in draw(st.lists(VALUES, max_size=5)):
        end = draw(LINE_ENDS)
        lines = json.dumps(payload, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1]))).split(
            "\n"
        )
        for line in lines:
            text += draw(st.sampled_from(["", *[noise + end for noise in (":", ": ping", "event: x", "id: 1")]]))
            text += f"data:{draw(st.sampled_from(['', ' ']))}{line}{end}" if line[:1] != " " else f"data: {line}{end}"
        text += end * draw(st.integers(1, 3))
        events.append("\n".join(lines).encode())
    return text.encode(), events


@st.composite
def pieces(draw: st.DrawFn, raw: bytes) -> list[bytes]:
    cuts = sorted(draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    return [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]


def cut(parts: Sequence[bytes]) -> list[bytes]:
    cutter = SSEDecoder()
    return [data for part in parts for data in cutter.feed(part)] + cutter.close()


@given(streams(), st.data())
@settings(max_examples=200, deadline=None)
def test_events_are_the_same_for_every_split(stream: tuple[bytes, list[bytes]], data: st.DataObject) -> None:
    raw, events = stream

    assert cut(data.draw(pieces(raw))) == events
    assert cut([bytes((byte,)) for byte in raw]) == events


@given(st.binary(max_size=300) | st.text("da:t \n\r\x00\ufeff", max_size=60).map(str.encode), st.data())
@example(b"data: a\n\ndata: b", None)
@settings(max_examples=300, deadline=None)
def test_bytes_of_any_kind_are_cut_the_same_for_every_split(raw: bytes, data: st.DataObject | None) -> None:
    whole = cut([raw])

    assert cut([bytes((byte,)) for byte in raw]) == whole
    if data is not None:
        assert cut(data.draw(pieces(raw))) == whole


def test_a_byte_order_mark_may_come_before_the_first_event_by_itself() -> None:
    assert cut([b"\xef\xbb\xbf", b"data: a\n\n"]) == [b"a"]


@given(st.dictionaries(TEXTS, VALUES, max_size=4), st.data())
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_what_is_read(payload: dict[str, Any], data: st.DataObject) -> None:
    written = format_event(payload)

    assert [json.loads(found) for found in cut(data.draw(pieces(written)))] == [payload]
    assert json.loads(encode_json(payload)) == payload


def relayed(parts: Sequence[bytes]) -> tuple[list[Any], str | None]:
    """Return the chunks of a response that comes in these parts, and the failure that it ends in."""

    async def read() -> tuple[list[Any], str | None]:
        response: Any = FedInPieces(parts)
        chunks: list[Any] = []
        try:
            async for block in PulledBlocks(UpstreamChunks(response, ChunkReader(), ())):
                chunks += [chunk.body for chunk in block]
        except UpstreamError as failure:
            return chunks, failure.message
        return chunks, None

    return asyncio.run(read())


CHUNKS = st.sampled_from(
    [
        b'data: {"choices":[{"index":0,"delta":{"content":"\xe5\xad\x97\xe2\x80\xa8"},"finish_reason":null}]}\n\n',
        b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\r\n\r\n',
        b'data: {"choices":[],\ndata: "usage":{"prompt_tokens":1}}\n\n',
        b"data: [DONE]\n\n",
        b": keep-alive\n\n",
        b'data: {"error":{"message":"no"}}\n\n',
        b"data: nonsense\n\n",
        b"data: null\n\n",
        b'data: {"choices":null}\n\n',
        b"\xef\xbb\xbf",
        b"data:\n\n",
    ]
)


@given(st.lists(CHUNKS, max_size=6).map(b"".join), st.data())
@settings(max_examples=150, deadline=None)
def test_a_response_is_told_the_same_for_every_split(raw: bytes, data: st.DataObject) -> None:
    """And ends well only with a finish reason or [DONE] after a chunk."""
    chunks, failure = relayed([raw])

    assert relayed(data.draw(pieces(raw))) == (chunks, failure)
    if failure is None:
        finished = any(choice.get("finish_reason") for chunk in chunks for choice in chunk["choices"])
        assert chunks
        assert finished or b"[DONE]" in raw
