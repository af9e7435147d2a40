from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.api.messages import (
    TOOL,
    a_call_delta,
    a_chunk,
    a_completion,
    accumulated,
    check_order,
    events_of,
    streamed,
    translated,
)

ASKED = translated(tools=[TOOL], thinking={"type": "enabled", "budget_tokens": 50}, stop_sequences=["END"])


def blocks(*chunks: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the blocks of a stream as the SDK reads them."""
    events = streamed(ASKED, chunks)
    check_order(events)
    content: list[dict[str, Any]] = accumulated(events).to_dict()["content"]  # type: ignore[assignment]
    return content


def test_a_text_is_streamed_as_it_comes() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    chunks = [a_chunk({"role": "assistant", "content": ""}), a_chunk({"content": "Hé"}), a_chunk({"content": '\n"llo'})]
    end = [a_chunk({}, "stop"), {"choices": [], "usage": usage}]
    events = streamed(ASKED, [*chunks, *end])
    assert [event["type"] for event in events] == [
        "message_start", "content_block_start", "content_block_delta", "content_block_delta", "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    assert accumulated(events).to_dict()["content"] == [{"type": "text", "text": 'Hé\n"llo'}]
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"]["input_tokens"] == 3


def test_the_first_chunk_begins_the_message_and_an_empty_one_sends_nothing_more() -> None:
    stream = ASKED.stream("small")
    first = events_of(stream.write(a_chunk({"role": "assistant"})))
    assert first[0]["message"]["model"] == "small"
    assert len(first) == 1
    assert stream.write(a_chunk({})) == b""


def test_a_stream_without_chunks_is_an_empty_message() -> None:
    events = streamed(ASKED, [])
    check_order(events)
    assert accumulated(events).content == []


def test_a_signature_is_sent_whole_at_the_end_of_its_block() -> None:
    thought = [a_chunk({"reasoning_content": "hm", "thinking_blocks": [{"type": "thinking", "thinking": "hm"}]})]
    signed = [a_chunk({"thinking_blocks": [{"type": "thinking", "thinking": "", "signature": part}]}) for part in "AB"]
    again = [a_chunk({"thinking_blocks": [{"type": "thinking", "thinking": "so", "signature": "C"}]})]
    hidden = [a_chunk({"thinking_blocks": [{"type": "redacted_thinking", "data": "D"}]})]
    assert blocks(*thought, *signed, *again, *hidden, a_chunk({"content": "x"})) == [
        {"type": "thinking", "thinking": "hm", "signature": "AB"},
        {"type": "thinking", "thinking": "so", "signature": "C"},
        {"type": "redacted_thinking", "data": "D"},
        {"type": "text", "text": "x"},
    ]


def test_white_space_before_a_call_opens_no_block_of_text() -> None:
    found = blocks(a_chunk({"content": "\n\n"}), a_chunk(a_call_delta("{}", id="a", name="Read")))
    assert [block["type"] for block in found] == ["tool_use"]


def test_calls_one_after_another_are_streamed_as_they_come() -> None:
    stream = ASKED.stream("m")
    stream.write(a_chunk(a_call_delta("", id="a", name="Read")))
    first = events_of(b"data"[:0] + stream.write(a_chunk(a_call_delta('{"x":'))))
    second = events_of(stream.write(a_chunk(a_call_delta("1}"))))
    third = events_of(stream.write(a_chunk(a_call_delta('{"y"', 1, id="b", name="Read"))))
    assert [event["type"] for event in first] == ["content_block_start", "content_block_delta"]
    assert second[0]["delta"]["partial_json"] == "1}"
    assert [event["type"] for event in third] == ["content_block_stop", "content_block_start", "content_block_delta"]


def test_calls_that_are_mixed_wait_for_one_another() -> None:
    found = blocks(
        a_chunk(a_call_delta('{"x":', 0, id="a", name="Read")),
        a_chunk(a_call_delta('{"y":', 1, id="b", name="Write")),
        a_chunk({"content": "between"}),
        a_chunk(a_call_delta("1}", 0)),
        a_chunk(a_call_delta("2}", 1)),
        a_chunk({}, "tool_calls"),
    )
    assert [block.get("input") or block.get("text") for block in found] == [{"x": 1}, {"y": 2}, "between"]


def test_calls_that_share_an_index_are_told_apart_by_their_ids() -> None:
    whole = [a_chunk(a_call_delta("{}", 0, id=each, name="Read")) for each in ("a", "b")]
    assert [block["id"] for block in blocks(*whole)] == ["a", "b"]


def test_a_name_that_comes_with_each_piece_is_told_once() -> None:
    found = blocks(*(a_chunk(a_call_delta(part, id="a", name="Read")) for part in ("{", '"x": 1', "}")))
    assert found == [{"type": "tool_use", "id": "a", "name": "Read", "input": {"x": 1}}]


@pytest.mark.parametrize(
    ("pieces", "told"),
    [(["", ""], {}), (["nu", "ll"], {}), (['"{', '}"'], {}), (["[", "1]"], {"arguments": [1]})],
)
def test_arguments_that_are_no_object_are_told_when_they_are_complete(pieces: list[str], told: dict[str, Any]) -> None:
    first, *rest = pieces
    found = blocks(a_chunk(a_call_delta(first, id="a", name="Read")), *(a_chunk(a_call_delta(part)) for part in rest))
    assert found[0]["input"] == told


def test_a_legacy_function_call_is_streamed_as_a_call() -> None:
    chunks = [{"function_call": {"name": "Read", "arguments": ""}}, {"function_call": {"arguments": '{"a": 1}'}}]
    found = blocks(*map(a_chunk, chunks), a_chunk({}, "function_call"))
    assert (found[0]["name"], found[0]["input"]) == ("Read", {"a": 1})


def test_a_refusal_is_streamed_as_text() -> None:
    events = streamed(ASKED, [a_chunk({"refusal": "I "}), a_chunk({"refusal": "cannot"}), a_chunk({}, "stop")])
    message = accumulated(events)
    assert message.stop_reason == "refusal"
    assert message.stop_details is not None
    assert message.stop_details.explanation == "I cannot"
    assert message.to_dict()["content"] == [{"type": "text", "text": "I cannot"}]


def test_other_choices_are_not_sent() -> None:
    other = a_chunk({"content": "other"}, "length")
    other["choices"][0]["index"] = 1
    events = streamed(ASKED, [a_chunk({"content": "a"}), other, a_chunk({"content": "b"}, "stop")])
    assert accumulated(events).to_dict()["content"] == [{"type": "text", "text": "ab"}]
    assert events[-2]["delta"]["stop_reason"] == "end_turn"


@pytest.mark.parametrize("where", ["usage", "x_groq"])
def test_usage_counts_wherever_it_comes(where: str) -> None:
    usage = {"prompt_tokens": 10, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 6}}
    last = {**a_chunk({"content": "b"}, "stop"), where: usage if where == "usage" else {"usage": usage}}
    told = streamed(ASKED, [a_chunk({"content": "a"}), last])[-2]["usage"]
    assert (told["input_tokens"], told["cache_read_input_tokens"], told["output_tokens"]) == (4, 6, 4)


def test_half_a_surrogate_pair_does_not_break_the_stream() -> None:
    events = streamed(ASKED, [a_chunk({"content": "a"}), a_chunk({"content": "\ud83d"}), a_chunk({"content": "b"})])
    assert [event["delta"].get("text") for event in events[2:5]] == ["a", "\ud83d", "b"]


@pytest.mark.parametrize("chunks", [[], [a_chunk({"content": "a"})]])
def test_a_failure_is_an_event_of_its_own(chunks: list[dict[str, Any]]) -> None:
    stream = ASKED.stream("m")
    for chunk in chunks:
        stream.write(chunk)
    kind, data = stream.fail({"message": "it broke", "type": "upstream_error", "code": None}, 502).splitlines()[:2]
    assert kind == b"event: error"
    assert json.loads(data[6:]) == {"type": "error", "error": {"type": "api_error", "message": "it broke"}}


def test_a_ping_keeps_the_stream_alive() -> None:
    assert ASKED.stream("m").keep_alive == b'event: ping\ndata: {"type":"ping"}\n\n'


# Any answer: some reasoning, some text, and calls with objects as arguments.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = st.recursive(st.integers() | TEXTS, lambda inner: st.lists(inner, max_size=2), max_leaves=3)
ARGUMENTS = st.dictionaries(TEXTS, VALUES, max_size=3).map(json.dumps) | st.sampled_from(["", "[1]", "null", "x"])
ANSWERS = st.fixed_dictionaries(
    {"reasoning_content": TEXTS, "content": TEXTS, "calls": st.lists(ARGUMENTS, max_size=3)}
)


def cut(draw: Any, text: str) -> list[str]:
    """Cut a text into pieces; none of an empty one."""
    places = sorted(draw(st.sets(st.integers(1, len(text) - 1), max_size=4))) if len(text) > 1 else []
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True) if text]


@st.composite
def mixed_streams(draw: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a message, and deltas of it: each text in its own order, and all mixed."""
    answer = draw(ANSWERS)
    rows: list[list[dict[str, Any]]] = [
        [{name: part} for part in cut(draw, answer[name])] for name in ("reasoning_content", "content")
    ]
    calls = []
    for index, arguments in enumerate(answer["calls"]):
        begun = a_call_delta("", index, id=f"c{index}", name=f"f{index}")
        rows.append([begun, *(a_call_delta(part, index) for part in cut(draw, arguments))])
        calls.append({"id": f"c{index}", "function": {"name": f"f{index}", "arguments": arguments}})
    deltas = []
    while rows := [row for row in rows if row]:
        deltas.append(draw(st.sampled_from(rows)).pop(0))
    message = {name: answer[name] for name in ("reasoning_content", "content")}
    return {**message, "tool_calls": calls}, deltas


def merged(content: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the thinking, the text and the calls of a message, wherever their blocks stand."""
    return {
        "thinking": "".join(block["thinking"] for block in content if block["type"] == "thinking"),
        "text": "".join(block["text"] for block in content if block["type"] == "text").rstrip(),
        "calls": {block["id"]: (block["name"], block["input"]) for block in content if block["type"] == "tool_use"},
    }


@given(mixed_streams())
@settings(deadline=None, max_examples=150)
def test_any_mixed_stream_has_blocks_in_sequence_that_hold_what_the_whole_answer_holds(mixed: Any) -> None:
    message, deltas = mixed
    events = streamed(ASKED, [*map(a_chunk, deltas), a_chunk({}, "stop")])
    check_order(events)
    whole = ASKED.answer(a_completion(message), "m")
    found = accumulated(events)
    assert merged(found.to_dict()["content"]) == merged(whole["content"])  # type: ignore[arg-type]
    assert found.stop_reason == whole["stop_reason"]


@pytest.mark.parametrize(("name", "kind"), [("reasoning_content", "thinking"), ("content", "text")])
def test_text_that_comes_while_a_call_waits_stays_in_order(name: str, kind: str) -> None:
    """The first call is complete before the second, and what follows the second waits for it."""
    deltas = [
        a_call_delta("", 0, id="c0", name="f0"),
        {name: "0"},
        a_call_delta("", 1, id="c1", name="f1"),
        {name: "1"},
        a_call_delta("{}", 0),
        {name: "2"},
    ]
    found = accumulated(streamed(ASKED, [*map(a_chunk, deltas), a_chunk({}, "stop")])).to_dict()

    assert merged(found["content"])[kind] == "012"  # type: ignore[arg-type]


@given(mixed_streams())
@settings(deadline=None, max_examples=60)
def test_one_chunk_holds_what_its_pieces_hold(mixed: Any) -> None:
    message, deltas = mixed
    calls = [{**call, "index": index} for index, call in enumerate(message["tool_calls"])]
    whole = blocks(a_chunk({**message, "tool_calls": calls}, "stop"))
    assert merged(whole) == merged(blocks(*map(a_chunk, deltas), a_chunk({}, "stop")))
