from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai._types import omit
from openai.lib.streaming.responses._responses import ResponseStreamState

from proxy.server.api.responses_reasoning import CARRIED_FIELDS, decode_carried
from proxy.upstream.completion_reader import CompletionBuilder
from tests.support.responses_api import (
    EVENT,
    ID,
    call_delta,
    check_events,
    check_response,
    chunk,
    completion,
    function,
    messages_of,
    played,
    read_events,
    translated,
)

SHELL = {"type": "shell"}
PATCH = {"type": "custom", "name": "patch"}
SPACE = {"type": "namespace", "name": "n", "description": "N.", "tools": [function("g")]}
USAGE = {
    "prompt_tokens": 10,
    "completion_tokens": 5,
    "total_tokens": 15,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 3},
}
USAGE_CHUNK = {"id": "c", "choices": [], "usage": USAGE}


def calls_chunk(*calls: Any, **more: Any) -> dict[str, Any]:
    return chunk(tool_calls=list(calls), **more)


def types_of(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def items_of(message: Mapping[str, Any], **fields: Any) -> list[dict[str, Any]]:
    answer = translated(**fields).answer(completion(**message), "big")
    check_response(answer)
    output: list[dict[str, Any]] = answer["output"]
    return output


def test_a_text_is_streamed_as_the_api_describes_it() -> None:
    stream = translated().stream("big")
    events = played(stream, [chunk(role="assistant", content=""), chunk(content="He"), chunk(content="y"), USAGE_CHUNK])
    check_events(events)
    assert types_of(events) == [
        *("created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.delta", "output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert stream.answer == events[-1]["response"]
    assert check_response(events[-1]["response"]).output_text == "Hey"


def test_an_answer_repeats_the_request_and_counts_all_tokens() -> None:
    fields: dict[str, Any] = {
        "instructions": "Be brief.",
        "temperature": 0.5,
        "metadata": {"k": "v"},
        "tools": [function("f"), SPACE],
    }
    answer = translated(**fields, store=False).answer(completion(content="x", usage=USAGE), "big")
    found = check_response(answer)
    assert {name: answer[name] for name in fields} == fields
    assert (found.model, found.id, found.status, answer["store"]) == ("big", f"resp_{ID}", "completed", False)
    assert answer["usage"] == {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 3},
        "total_tokens": 15,
    }


def test_usage_is_whole_even_if_the_model_reported_none() -> None:
    found = check_response(translated().answer(completion(content="x"), "big"))
    assert found.usage is not None
    assert found.usage.total_tokens == found.usage.input_tokens_details.cached_tokens == 0


def test_usage_that_is_reported_in_halves_is_put_together() -> None:
    halves = [{"prompt_tokens": 7, "completion_tokens": 0}, {"prompt_tokens": 0, "completion_tokens": 3}]
    events = played(translated().stream("big"), [{"choices": [], "usage": half} for half in halves])
    assert events[-1]["response"]["usage"]["total_tokens"] == 10


@pytest.mark.parametrize(
    ("finish_reason", "status", "why"),
    [
        ("stop", "completed", None),
        ("tool_calls", "completed", None),
        ("length", "incomplete", {"reason": "max_output_tokens"}),
        ("content_filter", "incomplete", {"reason": "content_filter"}),
    ],
)
def test_how_an_answer_ended_is_its_status(finish_reason: str, status: str, why: Any) -> None:
    stream = translated().stream("big")
    events = played(stream, [chunk(content="x"), chunk(finish_reason)])
    check_events(events)
    last = events[-1]
    assert (last["type"], last["response"]["incomplete_details"]) == (f"response.{status}", why)
    assert last["response"]["output"][0]["status"] == status


def test_reasoning_comes_first_and_is_a_summary() -> None:
    events = played(translated().stream("big"), [chunk(reasoning_content="hm"), chunk(content="x")])
    check_events(events)
    assert types_of(events)[2:7] == [
        *("output_item.added", "reasoning_summary_part.added", "reasoning_summary_text.delta"),
        *("reasoning_summary_text.done", "reasoning_summary_part.done"),
    ]
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message"]
    assert output[0]["summary"] == [{"type": "summary_text", "text": "hm"}]
    assert "encrypted_content" not in output[0]


@pytest.mark.parametrize(
    "message",
    [
        {"reasoning": "hm", "content": "x"},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                {"type": "text", "text": "x"},
            ]
        },
        {"reasoning_details": [{"type": "reasoning.text", "text": "hm"}], "content": "x"},
    ],
)
def test_reasoning_is_found_wherever_servers_write_it(message: dict[str, Any]) -> None:
    thought, said = items_of(message)
    assert (thought["summary"][0]["text"], said["content"][0]["text"]) == ("hm", "x")


def test_signed_reasoning_is_carried_by_the_client_and_comes_back_unchanged() -> None:
    pieces: list[dict[str, Any]] = [
        {"reasoning_content": "a", "thinking_blocks": [{"type": "thinking", "thinking": "a", "signature": None}]},
        {"reasoning_content": "b", "thinking_blocks": [{"type": "thinking", "thinking": "b"}]},
        {"thinking_blocks": [{"type": "thinking", "thinking": "", "signature": "c2ln"}]},
        {"thinking_blocks": [{"type": "redacted_thinking", "data": "xx"}]},
    ]
    stream = translated(include=["reasoning.encrypted_content"], store=False).stream("big")
    events = played(stream, [*(chunk(**piece) for piece in pieces), calls_chunk(call_delta(0, "{}", id="a", name="f"))])
    check_events(events)
    output = events[-1]["response"]["output"]
    assert output[0]["summary"][0]["text"] == "ab"
    returned = messages_of({"role": "user", "content": "hi"}, *output)[1]
    assert returned["reasoning_content"] == "ab"
    assert returned["thinking_blocks"] == [
        {"type": "thinking", "thinking": "ab", "signature": "c2ln"},
        {"type": "redacted_thinking", "data": "xx"},
    ]


def test_blocks_of_one_list_stay_apart() -> None:
    blocks = [{"type": "reasoning.text", "text": text} for text in "ab"]
    blocks.append({"type": "reasoning.text", "text": "c", "signature": "c2ln"})
    (thought,) = items_of({"reasoning_details": blocks}, include=["reasoning.encrypted_content"])
    assert decode_carried(thought["encrypted_content"]) == {"reasoning_details": blocks}


def test_what_was_asked_for_to_be_carried_is_there_even_if_nothing_was_signed() -> None:
    (thought,) = items_of({"reasoning_content": "hm"}, include=["reasoning.encrypted_content"])
    assert decode_carried(thought["encrypted_content"]) == {}


def test_a_signature_that_comes_after_the_text_is_not_lost() -> None:
    detail = {"type": "reasoning.encrypted", "data": "xx", "index": 0}
    events = played(translated().stream("big"), [chunk(content="x"), chunk(reasoning_details=[detail])])
    check_events(events)
    carried = decode_carried(events[-1]["response"]["output"][-1]["encrypted_content"])
    assert carried == {"reasoning_details": [detail]}
    assert set(carried) <= set(CARRIED_FIELDS)


def test_calls_that_a_stream_mixes_come_one_after_the_other() -> None:
    chunks = [
        calls_chunk(call_delta(0, '{"a":', id="a", name="f")),
        calls_chunk(call_delta(1, '{"b":', id="b", name="f")),
        chunk(content="Both."),
        calls_chunk(call_delta(0, "1}")),
        calls_chunk(call_delta(1, "2}")),
        chunk(content=" Done."),
    ]
    events = played(translated(tools=[function("f")]).stream("big"), chunks)
    check_events(events)
    output = events[-1]["response"]["output"]
    assert [item.get("arguments") for item in output] == ['{"a":1}', '{"b":2}', None]
    assert output[2]["content"][0]["text"] == "Both. Done."


def test_a_call_whose_arguments_are_whole_is_done_when_the_next_begins() -> None:
    stream = translated(tools=[function("f")]).stream("big")
    stream.write(calls_chunk(call_delta(0, '{"a":1}', id="a", name="f")))
    events = read_events(stream.write(calls_chunk(call_delta(1, '{"b"', id="b", name="f"))))
    assert types_of(events) == [
        *("function_call_arguments.done", "output_item.done", "output_item.added", "function_call_arguments.delta"),
    ]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ({"name": "f", "arguments": '{"a":1}'}, {"type": "function_call", "name": "f", "arguments": '{"a":1}'}),
        ({"name": "f", "arguments": ""}, {"type": "function_call", "name": "f", "arguments": "{}"}),
        ({"name": "unknown", "arguments": "{"}, {"type": "function_call", "name": "unknown", "arguments": "{"}),
        ({"name": "n__g", "arguments": "{}"}, {"type": "function_call", "name": "g", "namespace": "n"}),
        ({"name": "g", "arguments": "{}"}, {"type": "function_call", "name": "g", "namespace": "n"}),
        ({"name": "patch", "arguments": '{"input":"a"}'}, {"type": "custom_tool_call", "name": "patch", "input": "a"}),
        ({"name": "patch", "arguments": "*** a"}, {"type": "custom_tool_call", "input": "*** a"}),
        ({"name": "shell", "arguments": '{"commands":["ls"]}'}, {"type": "shell_call", "action": {"commands": ["ls"]}}),
        ({"name": "shell", "arguments": '{"run":"ls"}'}, {"type": "function_call", "name": "shell"}),
        (
            {"name": "local_shell", "arguments": '{"command":["ls"],"timeout_ms":9}'},
            {"action": {"type": "exec", "command": ["ls"], "env": {}, "timeout_ms": 9}},
        ),
        (
            {"name": "apply_patch", "arguments": '{"operation":{"type":"delete_file","path":"a"}}'},
            {"type": "apply_patch_call", "operation": {"type": "delete_file", "path": "a"}},
        ),
    ],
)
def test_a_function_call_is_the_call_of_the_tool_that_the_client_offered(call: Any, expected: dict[str, Any]) -> None:
    tools = [function("f"), PATCH, SPACE, SHELL, {"type": "local_shell"}, {"type": "apply_patch"}]
    (item,) = items_of({"tool_calls": [{"id": "c", "type": "function", "function": call}]}, tools=tools)
    assert {name: item.get(name) for name in expected} == expected
    assert item["call_id"] == "c"


def test_a_name_that_is_repeated_or_comes_in_pieces_is_one_name() -> None:
    for pieces in (["f", "f"], ["get_", "weather"]):
        chunks = [calls_chunk(call_delta(0, id="a", name=piece)) for piece in pieces]
        events = played(translated().stream("big"), [*chunks, calls_chunk(call_delta(0, "{}", name=pieces[-1]))])
        assert events[-1]["response"]["output"][0]["name"] == "".join(dict.fromkeys(pieces))


def test_calls_of_every_kind_stream_by_the_rules() -> None:
    tools = [function("f"), PATCH, SHELL]
    chunks = [
        calls_chunk(call_delta(0, '{"input":"', id="a", name="patch")),
        calls_chunk(call_delta(0, 'x"}')),
        calls_chunk(call_delta(1, '{"commands":["ls"]}', id="b", name="shell")),
        calls_chunk(call_delta(2, id="c", name="f")),
    ]
    events = played(translated(tools=tools).stream("big"), chunks)
    check_events(events)
    assert [item["type"] for item in events[-1]["response"]["output"]] == [
        *("custom_tool_call", "shell_call", "function_call"),
    ]
    assert [event["delta"] for event in events if event["type"].endswith("input.delta")] == ["x"]


def test_missing_and_repeated_ids_of_calls_become_different_ones() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    items = items_of({"tool_calls": [{**call, "id": "call_0"}, {**call, "id": "call_0"}, {**call, "id": ""}]})
    assert items[0]["call_id"] == "call_0"
    assert len({item["call_id"] for item in items}) == len({item["id"] for item in items}) == 3


def test_the_one_call_of_older_servers_is_a_call() -> None:
    pieces = [{"name": "f", "arguments": '{"a"'}, {"arguments": ":1}"}]
    events = played(translated().stream("big"), [chunk(function_call=piece) for piece in pieces])
    check_events(events)
    assert events[-1]["response"]["output"][0]["arguments"] == '{"a":1}'


def test_a_refusal_is_a_part_of_its_own() -> None:
    events = played(
        translated().stream("big"), [chunk(content="Hm."), chunk(refusal="No"), chunk(refusal="."), chunk()]
    )
    check_events(events)
    content = events[-1]["response"]["output"][0]["content"]
    assert content[1] == {"type": "refusal", "refusal": "No."}
    assert [event["delta"] for event in events if event["type"] == "response.refusal.delta"] == ["No", "."]


def test_sources_are_annotations_of_the_text() -> None:
    cited = {"start_index": 0, "end_index": 1, "title": "T", "url": "https://example.com"}
    found = [{"type": "url_citation", "url_citation": cited}, {"type": "other"}]
    events = played(translated().stream("big"), [chunk(content="x", annotations=found), chunk(content="y")])
    check_events(events)
    assert events[-1]["response"]["output"][0]["content"][0]["annotations"] == [{"type": "url_citation", **cited}]


def test_probabilities_are_told_to_who_asked_for_them() -> None:
    tokens = {
        "content": [{"token": "x", "logprob": -0.1, "bytes": None, "top_logprobs": [{"token": "y", "logprob": -2}]}]
    }
    piece = chunk(content="x")
    piece["choices"][0]["logprobs"] = tokens
    for fields, expected in ({"top_logprobs": 1}, 1), ({}, 0):
        events = played(translated(**fields).stream("big"), [chunk(content="a"), piece])
        check_events(events)
        assert len(events[-1]["response"]["output"][0]["content"][0]["logprobs"]) == expected


def test_only_the_first_of_several_answers_is_told() -> None:
    several = completion(content="first")
    several["choices"].append(
        {"index": 1, "message": {"role": "assistant", "content": "second"}, "finish_reason": "length"}
    )
    answer = translated().answer(several, "big")
    assert (answer["status"], check_response(answer).output_text) == ("completed", "first")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        ({"message": "m", "type": "rate_limit_error", "code": "model_busy"}, 429, "rate_limit_exceeded"),
        ({"message": "m", "type": "insufficient_quota", "code": None}, 429, "insufficient_quota"),
        ({"message": "m", "code": "context_length_exceeded"}, 400, "context_length_exceeded"),
        ({"message": "m", "type": "invalid_request_error"}, 422, "invalid_prompt"),
        ({"message": "m", "code": "upstream_timeout"}, 504, "server_error"),
        ({"message": "m", "code": "shutting_down"}, 503, "server_error"),
    ],
)
def test_a_failure_has_a_code_that_clients_know(error: dict[str, Any], status: int, code: str) -> None:
    stream = translated().stream("big")
    events = read_events(stream.fail(error, status))
    assert types_of(events) == ["created", "in_progress", "failed"]
    assert events[-1]["response"]["error"] == {"code": code, "message": "m"}
    assert stream.answer is None


def test_a_failure_keeps_what_was_said_but_no_call_that_could_be_run() -> None:
    stream = translated(tools=[function("f")]).stream("big")
    before = stream.write(chunk(content="x")) + stream.write({"choices": [], "usage": USAGE})
    started = stream.write(calls_chunk(call_delta(0, '{"a"', id="a", name="f")))
    events = read_events(before + started + stream.fail({"message": "m"}, 502))
    check_events(events)
    assert [item["type"] for item in events[-1]["response"]["output"]] == ["message"]
    assert events[-1]["response"]["usage"]["total_tokens"] == 15
    assert stream.write(chunk(content="y")) == stream.finish() == b""


def test_half_a_character_is_sent_escaped() -> None:
    stream = translated().stream("big")
    events = played(stream, [chunk(content="a"), chunk(content="\ud83d"), chunk(content="\udc00")])
    assert [event["delta"] for event in events if event["type"].endswith("text.delta")] == ["a", "\ud83d", "\udc00"]


def test_the_official_client_puts_a_stream_together() -> None:
    chunks = [chunk(reasoning_content="hm"), chunk(content="He"), chunk(content="y")]
    chunks += [
        calls_chunk(call_delta(0, '{"a"', id="a", name="f")),
        calls_chunk(call_delta(0, ":1}")),
        chunk("tool_calls"),
    ]
    state: Any = ResponseStreamState(input_tools=omit, text_format=omit)
    seen = []
    for event in played(translated(tools=[function("f")]).stream("big"), chunks):
        seen += state.handle_event(EVENT.validate_python(event))
    response = seen[-1].response
    assert (response.output_text, response.output[2].arguments) == ("Hey", '{"a":1}')
    assert [event.snapshot for event in seen if event.type == "response.output_text.delta"] == ["He", "Hey"]


TEXTS = st.text(max_size=4)
ARGUMENTS = st.sampled_from(["", "{", "}", '{"a":', "1}", '{"input":"x"}', '{"commands":["ls"]}', "{}"])
NAMES = st.sampled_from(["f", "patch", "shell", "n__g", "other"])


@st.composite
def deltas(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["content", "reasoning_content", "refusal", "call", "named", "both"]))
    if kind == "call":
        return {"tool_calls": [call_delta(draw(st.integers(0, 2)), draw(ARGUMENTS))]}
    if kind == "named":
        named = call_delta(draw(st.integers(0, 2)), draw(ARGUMENTS), id=draw(st.sampled_from("abc")), name=draw(NAMES))
        return {"tool_calls": [named]}
    if kind == "both":
        return {"content": draw(TEXTS), "reasoning_content": draw(TEXTS)}
    return {kind: draw(TEXTS)}


STREAMS = st.lists(deltas(), max_size=20)
TOOLS = [function("f"), PATCH, SHELL, SPACE]


def texts_of(response: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return all reasoning, all text and all refusals of a response."""
    output = response["output"]
    parts = [part for item in output if item["type"] == "message" for part in item["content"]]
    return (
        "".join(part["text"] for item in output if item["type"] == "reasoning" for part in item["summary"]),
        "".join(part["text"] for part in parts if part["type"] == "output_text"),
        "".join(part["refusal"] for part in parts if part["type"] == "refusal"),
    )


@given(STREAMS)
def test_any_stream_obeys_the_rules_and_changes_nothing_that_it_is_given(pieces: list[dict[str, Any]]) -> None:
    chunks = [chunk(**piece) for piece in pieces]
    before = copy.deepcopy(chunks)
    stream = translated(tools=TOOLS).stream("big")
    events = played(stream, chunks)
    check_events(events)
    check_response(events[-1]["response"])
    assert chunks == before


@given(STREAMS)
def test_what_is_streamed_piece_by_piece_is_what_is_done(pieces: list[dict[str, Any]]) -> None:
    events = played(translated(tools=TOOLS).stream("big"), [chunk(**piece) for piece in pieces])
    streamed: dict[tuple[Any, ...], str] = {}
    for event in events:
        place = tuple(event.get(name) for name in ("item_id", "content_index", "summary_index"))
        if event["type"].endswith(".delta"):
            streamed[place] = streamed.get(place, "") + event["delta"]
        elif event["type"].endswith(("text.done", "refusal.done", "arguments.done", "input.done")):
            done = next(event[name] for name in ("text", "refusal", "arguments", "input") if name in event)
            assert streamed.pop(place, "") == done
    assert streamed == {}
    added = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert added == events[-1]["response"]["output"]


@given(STREAMS)
def test_a_stream_and_the_whole_answer_say_the_same(pieces: list[dict[str, Any]]) -> None:
    chunks = [chunk(**piece) for piece in pieces]
    builder = CompletionBuilder()
    for each in [*chunks, chunk("stop")]:
        builder.add(each)
    asked = translated(tools=TOOLS)
    stream = asked.stream("big")
    played(stream, chunks)
    assert stream.answer is not None
    assert texts_of(stream.answer) == texts_of(asked.answer(builder.completion(), "big"))


@given(st.lists(st.tuples(st.integers(0, 3), st.text(max_size=3)), max_size=12))
def test_arguments_that_come_mixed_are_put_together_by_call(pieces: list[tuple[int, str]]) -> None:
    """Arguments are one JSON string in pieces, which is whole only at the end."""
    opened = [calls_chunk(call_delta(index, '"', id=f"call-{index}", name="f")) for index in range(4)]
    written = [calls_chunk(call_delta(index, json.dumps(text)[1:-1])) for index, text in pieces]
    events = played(translated(tools=[function("f")]).stream("big"), [*opened, *written])
    for index, item in enumerate(events[-1]["response"]["output"]):
        expected = "".join(json.dumps(text)[1:-1] for place, text in pieces if place == index)
        assert (item["call_id"], item["arguments"]) == (f"call-{index}", f'"{expected}')
