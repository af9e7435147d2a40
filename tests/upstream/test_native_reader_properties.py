from __future__ import annotations

import contextlib
import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import UpstreamError
from proxy.settings.model_config import NativeAPI
from proxy.storage.usage import parse_usage, usage_of
from proxy.upstream.chunk_reader import is_finished
from proxy.upstream.native_chunks import messages_completion, new_chunks, responses_completion
from proxy.upstream.native_events import new_builder
from proxy.upstream.native_reader import NativeReader
from proxy.upstream.payload import NativePayload, content_bytes, has_content, is_empty_completion
from tests.support.native_answers import MESSAGE_EVENTS, RESPONSE_EVENTS, event
from tests.support.odd_values import with_one_odd_value

STREAMS: dict[NativeAPI, bytes] = {"messages": b"".join(MESSAGE_EVENTS), "responses": b"".join(RESPONSE_EVENTS)}
ERROR = event({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}})

# Endings of a stream, from which its whole text is cut or to which it is continued.
ENDINGS = (b"", ERROR, b"event: x\ndata: {oops\n\n", b"data: [DONE]\n\n", b": bye\n\n")


def read(api: NativeAPI, pieces: list[bytes]) -> tuple[bytes, str | None, bool]:
    """Return what is relayed, the error at the end, and whether the reader stopped before the last piece."""
    reader = NativeReader(api)
    found = b""
    left = list(pieces)
    while not reader.done:
        block = reader.feed(left.pop(0)) if left else reader.close()
        found += b"".join(each.with_model("ours") for each in block)
    error = reader.final_error
    return found, None if error is None else f"{error.message} {error.status}", bool(left)


def split(data: bytes, places: list[int]) -> list[bytes]:
    cuts = [0, *sorted(place % len(data) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(cuts) if end > start]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("api", ["messages", "responses"])
@given(st.lists(st.integers(0, 10**6), max_size=12), st.integers(1, 40), st.sampled_from(ENDINGS))
def test_however_the_bytes_are_split_the_same_is_relayed(
    api: NativeAPI, line_end: bytes, places: list[int], events: int, ending: bytes
) -> None:
    whole = STREAMS[api].split(b"\n\n")
    sent = (b"\n\n".join(whole[:events]) + b"\n\n" + ending).replace(b"\n", line_end)

    expected = read(api, [sent])
    relayed, error, _ = read(api, split(sent, places))

    assert (relayed, error) == expected[:2]
    assert (error is None) == (events >= len(whole) - 1)


@pytest.mark.parametrize("api", ["messages", "responses"])
def test_every_byte_may_come_alone(api: NativeAPI) -> None:
    whole = read(api, [STREAMS[api]])

    assert read(api, [bytes((byte,)) for byte in STREAMS[api]]) == whole


KINDS = sorted(
    {json.loads(each.partition(b"data: ")[2])["type"] for each in (*MESSAGE_EVENTS, *RESPONSE_EVENTS)}
    | {"response.failed", "response.incomplete", "error", "response.refusal.delta", "unknown"}
)
NAMES = (
    *("index", "content_block", "delta", "message", "usage", "stop_reason", "type", "text", "thinking", "signature"),
    *("input", "partial_json", "id", "name", "response", "item", "output_index", "output", "status", "error"),
    *("encrypted_content", "summary", "content", "input_tokens", "cache_creation", "input_tokens_details", "call_id"),
    *("cache_read_input_tokens", "arguments", "incomplete_details", "output_tokens_details", "model"),
)
TYPES = ("text", "tool_use", "thinking", "redacted_thinking", "reasoning", "function_call", "text_delta", "odd")
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-5, 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(TYPES)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=6),
    max_leaves=20,
)
EVENTS = st.builds(
    lambda kind, members: {**members, "type": kind},
    st.sampled_from(KINDS),
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6),
)


@pytest.mark.parametrize("api", ["messages", "responses"])
def test_an_event_with_one_odd_value_makes_a_whole_answer_or_an_error_of_the_upstream(api: NativeAPI) -> None:
    events = [json.loads(each.partition(b"data: ")[2]) for each in STREAMS[api].split(b"\n\n") if each]
    for place in range(len(events)):
        for odd in with_one_odd_value(events[place]):
            builder = new_builder(api)
            with contextlib.suppress(UpstreamError):
                for each in (*events[:place], odd, *events[place + 1 :]):
                    if isinstance(each, dict):
                        builder.add(each)
                builder.answer()


def inspect(body: dict[str, Any]) -> None:
    """Do what the server does with a chunk or a completion."""
    parse_usage(usage_of(body))
    has_content(body)
    content_bytes(body)
    is_finished(body)
    is_empty_completion(body)


@pytest.mark.parametrize("api", ["messages", "responses"])
@settings(max_examples=150)
@given(st.lists(EVENTS, max_size=8))
def test_odd_events_are_relayed_or_an_error_of_the_upstream(api: NativeAPI, events: list[dict[str, Any]]) -> None:
    chunks = new_chunks(api)
    for each in events:
        raw = json.dumps(each).encode()
        try:
            payload = NativePayload(chunks.chunk(each), raw, native=each, event_type=b"x")
        except UpstreamError:
            return
        inspect(payload.body)
        relayed = json.loads(payload.with_model("ours").removeprefix(b"event: x\ndata: "))
        assert without_model(relayed) == without_model(each)


def without_model(body: dict[str, Any]) -> dict[str, Any]:
    """Return an event without the models of the answers in it."""
    answers = ("message", "response")
    return {
        name: {**value, "model": None} if name in answers and isinstance(value, dict) else value
        for name, value in body.items()
    }


@pytest.mark.parametrize("api", ["messages", "responses"])
@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=8), st.lists(VALUES, max_size=4))
def test_an_odd_answer_in_place_of_events_becomes_events_or_an_error(
    api: NativeAPI, members: dict[str, Any], content: list[Any]
) -> None:
    answer = {**members, ("content" if api == "messages" else "output"): content}
    reader = NativeReader(api)
    block = [*reader.feed(json.dumps(answer).encode()), *reader.close()]

    assert reader.done
    assert (reader.final_error is None) == bool(block)
    for payload in block:
        inspect(payload.body)
        assert payload.with_model("ours").startswith(b"event: ")


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=8))
def test_odd_answers_become_completions(answer: dict[str, Any]) -> None:
    inspect(messages_completion(answer))
    inspect(responses_completion(answer))
