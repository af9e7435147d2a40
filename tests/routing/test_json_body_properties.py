from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import orjson
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.errors import BadRequest
from proxy.routing.chat_request import ChatRequest, parse_chat
from proxy.routing.fingerprints import ConversationHistory, inspect_history
from proxy.routing.json_body import summarize_any, summarize_plain
from proxy.routing.requirements import ContentSummary, estimate_tokens, requirements_of, routing_text
from proxy.upstream.sse import encode_json

NAMES = st.sampled_from(
    [
        *("model", "messages", "stream", "stream_options", "include_usage", "uniroute", "lambda", "models", "provider"),
        *("metadata", "extra_body", "api_base", "role", "content", "type", "text", "image_url", "url", "user", "tools"),
        *("max_tokens", "n", "max_cost_usd", "session", "fallbacks", "response_format", "json_schema", "Model", "x"),
    ]
)  # fmt: skip
WORDS = st.sampled_from(["auto", "user", "text", "assistant", "tool", "image_url", "json_schema", ""]) | st.text(
    max_size=5
)
NUMBERS = st.integers(-5, 10**30) | st.floats(width=64)
SCALARS = st.none() | st.booleans() | NUMBERS | WORDS
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | WORDS, inner, max_size=4),
    max_leaves=12,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": WORDS | VALUES, "content": WORDS | st.lists(VALUES, max_size=3) | VALUES}),
    min_size=1,
)
BODIES = st.fixed_dictionaries(
    {"model": WORDS | SCALARS, "messages": MESSAGES | VALUES},
    optional={"stream": VALUES, "stream_options": VALUES, "uniroute": VALUES, "models": VALUES, "provider": VALUES,
              "extra_body": VALUES, "metadata": VALUES, "tools": VALUES, "n": VALUES, "max_tokens": VALUES,
              "response_format": VALUES, "modalities": VALUES, "audio": VALUES},
)  # fmt: skip
OURS = ("uniroute", "models", "provider", "route")
HEADERS = st.lists(
    st.tuples(st.sampled_from(["lambda", "x-uniroute-lambda", "host"]), st.text(max_size=8) | NUMBERS.map(str)),
    max_size=2,
)


def parsed(raw: bytes, headers: list[tuple[str, str]]) -> ChatRequest | None:
    try:
        return parse_chat(raw, headers)
    except BadRequest:
        return None


@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")), HEADERS)
@example(b"\xef\xbb\xbf{}", [])
@settings(max_examples=150, deadline=None)
def test_bytes_of_any_kind_are_refused_or_taken(raw: bytes, headers: list[tuple[str, str]]) -> None:
    parsed(raw, headers)


@given(BODIES, HEADERS)
@settings(max_examples=200, deadline=None)
def test_what_is_taken_can_be_written_and_read_again(body: dict[str, Any], headers: list[tuple[str, str]]) -> None:
    request = parsed(json.dumps(body).encode(), headers)
    if request is None:
        return
    again = parse_chat(encode_json(request.body), [])

    assert again.body == request.body == {name: value for name, value in body.items() if name not in OURS}
    assert request.options.lambda_ is None or math.isfinite(request.options.lambda_)


@given(BODIES)
@settings(max_examples=150, deadline=None)
def test_nothing_in_a_body_breaks_what_reads_it(body: dict[str, Any]) -> None:
    request = parsed(json.dumps(body).encode(), [])
    if request is None:
        return

    assert isinstance(routing_text(request.body["messages"]), str)
    assert estimate_tokens(request.body) >= 0
    assert requirements_of(request.body).prompt_tokens >= 0


SPEAKERS = st.sampled_from(["user", "assistant", "system", "developer", "tool", "data:", 5, ["user"], None])
PLAIN = st.fixed_dictionaries(
    {"model": WORDS, "messages": st.lists(
        st.fixed_dictionaries({"role": SPEAKERS, "content": st.text(":aé\\\"", max_size=9) | SCALARS},
                              optional={"name": WORDS}) | VALUES)},
    optional={"stream": SCALARS, "a:b": SCALARS, "temperature": NUMBERS, "user": st.text(":a", max_size=4),
              "stop": VALUES, "max_tokens": SCALARS},
)  # fmt: skip


@given(PLAIN, st.booleans(), st.booleans())
@settings(max_examples=1500, deadline=None)
def test_a_plain_chat_is_counted_as_any_other(body: dict[str, Any], ascii_only: bool, repeated: bool) -> None:
    raw = json.dumps(body, ensure_ascii=ascii_only).encode()
    if repeated:
        raw = raw[:-1] + b', "model": "x:y"}'
    try:
        document = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return
    plain, counted = summarize_plain(document, raw), summarize_any(document, raw)

    assert plain is None or plain == replace(counted or ContentSummary(), plain_messages=True)
    if plain is not None:
        assert inspect_history(document["messages"]) == ConversationHistory()
        assert requirements_of(document, plain) == requirements_of(document)


def test_a_plain_chat_is_recognised() -> None:
    body = {"model": "auto", "stream": True, "messages": [{"role": "user", "content": "1: 2"}] * 3}
    raw = json.dumps(body).encode()

    assert summarize_plain(body, raw) == ContentSummary(3 * len("rolecontentuser1: 2"), plain_messages=True)


@given(st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2)))
@settings(max_examples=200, deadline=None)
def test_a_key_given_twice_is_never_taken(value: Any) -> None:
    raw = b'{"model": "auto", "messages": [{"role": "user"}], "x": %s, "x": %s}' % ((json.dumps(value).encode(),) * 2)

    assert parsed(raw, []) is None
