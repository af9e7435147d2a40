from __future__ import annotations

import json

import pytest

from proxy.json_text import decode_json, encode_json
from proxy.upstream.sse import MAX_EVENT_BYTES, EventTooLong, SSEDecoder, format_event

STREAM = (
    'data: {"a":"x\u2028y\u0085z\x0b"}\n\n: comment\r\n\r\nevent: e\r\ndata:{"b":\r\ndata: 2}\r\n\r\n\ndata: [DONE]\n\n'
).encode()
EVENTS = ['{"a":"x\u2028y\u0085z\x0b"}'.encode(), b'{"b":\n2}', b"[DONE]"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_every_split_gives_the_same_events(size: int) -> None:
    cutter = SSEDecoder()
    pieces = [STREAM[start : start + size] for start in range(0, len(STREAM), size)]

    assert [data for piece in pieces for data in cutter.feed(piece)] == EVENTS
    assert cutter.close() == []


def test_an_event_without_its_blank_line_comes_at_the_end() -> None:
    cutter = SSEDecoder()

    assert cutter.feed(b'data: {"a": 1}\ndata: ') == []
    assert cutter.close() == [b'{"a": 1}\n']


def test_an_endless_event_is_rejected() -> None:
    cutter = SSEDecoder()
    cutter.feed(b"x" * MAX_EVENT_BYTES)
    with pytest.raises(EventTooLong):
        cutter.feed(b"x")


def test_half_characters_are_encoded_as_they_came() -> None:
    half = decode_json(b'{"a": "\\ud83d"}')

    assert encode_json(half) == b'{"a":"\\ud83d"}'
    assert format_event({"a": "字"}) == 'data: {"a":"字"}\n\n'.encode()


def test_nesting_beyond_the_stack_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="nested"):
        decode_json(b"[" * 200_000)
    with pytest.raises(json.JSONDecodeError):
        decode_json(b"{")
