"""Requests and chunks that no client and no server should send: they are refused, or understood as far as possible."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import BadRequest
from proxy.server.api.responses_request import KNOWN_FIELDS, translate
from tests.server.api.test_responses_request import ITEMS
from tests.support.odd_values import with_one_odd_value
from tests.support.responses_api import CREATED_AT, ID, chunk, function, read_events, translated

TEXT = st.sampled_from(["", "x", "message", "function", "allowed_tools", "\ud83d", "uniroute1.e30="])
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2**70) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(TEXT | st.sampled_from(["type", "name"]), inner, max_size=3)
    ),
    max_leaves=6,
)
MEMBERS = sorted({name for item, _, _ in ITEMS.values() for name in item} | {"id", "encrypted_content", "namespace"})
ITEM_OF_ANY_TYPE = st.builds(
    lambda members, kind: {**members, "type": kind},
    st.dictionaries(st.sampled_from(MEMBERS), JSON, max_size=5),
    st.sampled_from(sorted(ITEMS)) | JSON,
)
NEARLY_AN_ITEM = st.builds(
    lambda kind, name, value: {"type": kind, **ITEMS[kind][0], name: value},
    st.sampled_from(sorted(ITEMS)),
    st.sampled_from(MEMBERS),
    JSON,
)
TOOL = st.builds(
    lambda kind, name, more: {"type": kind, "name": name, **more},
    st.sampled_from(["function", "custom", "namespace", "shell", "apply_patch", "mcp"]) | JSON,
    st.sampled_from("ab") | JSON,
    st.dictionaries(st.sampled_from(["parameters", "tools", "description", "format", "environment"]), JSON, max_size=2),
)
FIELDS = st.dictionaries(st.sampled_from(sorted(KNOWN_FIELDS)), JSON, max_size=4)
MESSAGE_MEMBERS = (
    *("content", "reasoning_content", "refusal", "tool_calls", "function_call", "annotations"),
    *("thinking_blocks", "reasoning_details"),
)
DELTA = st.dictionaries(
    st.sampled_from(MESSAGE_MEMBERS),
    JSON
    | st.lists(
        st.dictionaries(
            st.sampled_from(
                ["index", "id", "function", "type", "text", "thinking", "signature", "data", "url_citation"]
            ),
            JSON | st.fixed_dictionaries({"name": TEXT, "arguments": JSON}),
        ),
        max_size=3,
    ),
    max_size=3,
)


@given(FIELDS, st.lists(ITEM_OF_ANY_TYPE | NEARLY_AN_ITEM | JSON, max_size=4) | JSON, st.lists(TOOL, max_size=3))
def test_any_request_is_translated_or_refused_with_the_name_of_a_field(
    fields: dict[str, Any], items: Any, tools: list[Any]
) -> None:
    document = {"model": "auto", "input": items, "tools": tools, **fields}
    refused_field = None
    try:
        found = translate(document, answer_id=ID, created_at=CREATED_AT)
        json.dumps([found.body, found.document, found.left_out])
        found.stream("big").finish()
    except BadRequest as refusal:
        refused_field = str(refusal.param).partition("[")[0].partition(".")[0]
    assert refused_field in {None, *KNOWN_FIELDS}


@pytest.mark.parametrize("kind", ITEMS)
def test_an_item_with_one_odd_value_is_told_or_refused_by_its_name(kind: str) -> None:
    for item in with_one_odd_value({"type": kind, **ITEMS[kind][0]}):
        with contextlib.suppress(BadRequest):
            found = translated(input=[USER, {"type": "function_call", "call_id": "c", "name": "f"}, item])
            assert all(isinstance(message["content"], str | list | None) for message in found.body["messages"])


@given(st.lists(DELTA, max_size=6), JSON, JSON)
def test_any_stream_is_translated_by_the_rules(deltas: list[dict[str, Any]], end: Any, usage: Any) -> None:
    stream = translated(tools=[function("x")], top_logprobs=1).stream("big")
    chunks: list[dict[str, Any]] = [chunk(**delta) for delta in deltas]
    chunks.append({"choices": [{"delta": {"content": "x"}, "finish_reason": end, "logprobs": end}], "usage": usage})
    chunks.append({"choices": end, "service_tier": usage})
    events = read_events(b"".join([*(stream.write(each) for each in chunks), stream.finish()]))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["type"] in ("response.completed", "response.incomplete")


USER = {"role": "user", "content": "hi"}
COUNT = 20_000
LARGE: dict[str, dict[str, Any]] = {
    "calls in a row": {
        "input": [USER, *({"type": "function_call", "call_id": str(n), "name": "f"} for n in range(COUNT))]
    },
    "calls of one id": {"input": [USER, *[{"type": "function_call", "call_id": "c", "name": "f"}] * COUNT]},
    "results of one id": {"input": [USER, *[{"type": "function_call_output", "call_id": "c", "output": "x"}] * COUNT]},
    "system messages": {"input": [*[{"role": "system", "content": "x" * 1000}] * COUNT, USER]},
    "reasoning": {"input": [USER, *[{"type": "reasoning", "summary": []}] * COUNT]},
    "tools of one name": {"tools": [function("f")] * COUNT},
    "names that are joined alike": {
        "tools": [
            {
                "type": "namespace",
                "name": "n",
                "tools": [function(f"f{chr(0x100 + number)}") for number in range(COUNT)],
            }
        ]
    },
}


@pytest.mark.parametrize("name", LARGE)
def test_large_requests_take_time_in_proportion(name: str) -> None:
    fields = LARGE[name]
    started = time.process_time()
    translated(**fields)
    assert time.process_time() - started < 3  # quadratic work would take minutes
