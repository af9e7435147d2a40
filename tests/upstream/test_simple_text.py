from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.routing.affinity import NO_AFFINITY, AffinityRecorder
from proxy.routing.fingerprints import TextSample, TurnFingerprints, has_fingerprints
from proxy.storage.redis import Store
from proxy.storage.sessions import SessionStore
from proxy.upstream.payload import content_bytes, has_content, simple_text

QUESTION = [{"role": "user", "content": "And then?"}]
TEXTS = st.text(st.sampled_from("a字😀\ud800 "), max_size=6)
CALLS = [{"index": 0, "id": "call_9Kq2Xw7Lm4", "function": {"name": "find", "arguments": "{}"}}]
VALUES: st.SearchStrategy[Any] = (
    st.none() | TEXTS | st.booleans() | st.sampled_from([0, [], {}, CALLS, {"name": "f"}, [{"type": "thinking"}]])
)
FIELDS = (
    *("content", "role", "tool_calls", "function_call", "refusal", "reasoning_content", "reasoning", "audio", "images"),
    *("thinking_blocks", "reasoning_details", "signature", "made_up"),
)
DELTAS = st.dictionaries(st.sampled_from(["content", "content", *FIELDS]), VALUES, max_size=4) | TEXTS.map(
    lambda text: {"content": text}
)
CHOICES = st.fixed_dictionaries(
    {},
    optional={
        "delta": DELTAS,
        "index": st.sampled_from([0, 0, 1, None, "0"]),
        "finish_reason": st.sampled_from([None, None, "stop", ""]),
        "message": DELTAS,
        "logprobs": st.none(),
    },
)
CHUNKS = st.fixed_dictionaries({"choices": st.lists(CHOICES, max_size=2) | st.none()}, optional={"usage": st.none()})
REASONING = {"delta": {"reasoning_content": "Let me see. " * 30}}


def in_general(chunk: dict[str, Any]) -> dict[str, Any]:
    """Return the same chunk as mappings that the fast path does not take."""
    choices = chunk["choices"]
    return chunk if choices is None else {**chunk, "choices": [MappingProxyType(choice) for choice in choices]}


def remembered(chunks: Sequence[dict[str, Any]]) -> list[str]:
    memory = SessionStore(Store("unix:///nowhere"), 60)
    recorder = AffinityRecorder(memory, NO_AFFINITY, QUESTION)
    for chunk in chunks:
        recorder.observe(chunk, "small")
    return list(memory._local)


@given(CHUNKS)
@settings(max_examples=400, deadline=None)
def test_the_fast_path_finds_the_same_content_and_bytes(chunk: dict[str, Any]) -> None:
    general = in_general(chunk)
    assert simple_text(general) is None
    assert (has_content(chunk), content_bytes(chunk)) == (has_content(general), content_bytes(general))


@given(st.lists(CHUNKS, max_size=5))
@example([{"choices": [REASONING]}, {"choices": [{"delta": {"content": "."}, "finish_reason": "stop"}]}])
@settings(max_examples=300, deadline=None)
def test_the_fast_path_leaves_the_same_fingerprints(chunks: list[dict[str, Any]]) -> None:
    assert remembered(chunks) == remembered([in_general(chunk) for chunk in chunks])


@given(DELTAS, st.text(max_size=3))
@settings(max_examples=300, deadline=None)
def test_a_chunk_without_fingerprints_changes_nothing(part: dict[str, Any], name: str) -> None:
    turn = TurnFingerprints()
    turn.add({"role": "assistant", name: "x", **part})
    if not has_fingerprints(part):
        assert turn.is_empty
        assert not [*turn.of_reasoning(TextSample()), *turn.of_calls(TextSample())]


def test_fingerprints_are_complete_when_the_last_text_comes_with_the_finish_reason() -> None:
    ended: list[dict[str, Any]] = [
        {"choices": [REASONING]},
        {"choices": [{"delta": {"content": "."}, "finish_reason": "stop"}]},
    ]
    assert remembered(ended[:1]) == []
    assert len(remembered(ended)) == 1


@pytest.mark.parametrize(
    ("delta", "text"),
    [
        ({"content": " word"}, " word"),
        ({"role": "assistant", "content": ""}, ""),
        ({"role": None, "content": "a", "tool_calls": None, "refusal": None}, "a"),
        ({"content": "a", "tool_calls": [], "reasoning_content": ""}, "a"),
        ({"content": "a", "tool_calls": [{}]}, None),
        ({"content": "a", "reasoning_content": "b"}, None),
        ({"content": None}, None),
        ({}, None),
    ],
)
def test_which_chunks_are_simple_text(delta: dict[str, Any], text: str | None) -> None:
    choice = {"index": 0, "delta": delta, "finish_reason": None}
    assert simple_text({"choices": [choice]}) == text
    assert simple_text({"choices": [{"index": 0, "message": delta}]}) == text
    assert simple_text({"choices": [choice, choice]}) is None
    assert simple_text({"choices": [{**choice, "message": delta}]}) is None
