from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from proxy.errors import BadRequest
from proxy.routing.chat_request import parse_chat
from proxy.settings.outbound import Outbound
from proxy.settings.schema import Settings
from proxy.storage.records import ResolvedProvider
from proxy.upstream.chunk_reader import ChunkReader
from proxy.upstream.direct_target import DirectTargets, build_body
from proxy.upstream.payload import JSONPayload, parse, replace_model
from proxy.upstream.sse import format_event
from tests.support.makers import a_record

ASK: Any = [{"role": "user", "content": "hi"}]
MODELS = st.sampled_from(
    ["auto", "a", "theirs", 'quo"ted', "back\\slash", "é字😀", "a/b:c@d", " ", '"model":"x"', "{", "}"]
)
TRICKY = [
    "model",
    'x"model',
    'model"',
    '\\"model',
    "\\",
    "{",
    "}",
    '{"model":"auto"}',
    '"model": "theirs"',
    "stream",
    "é",
]
NAMES = st.sampled_from(TRICKY) | st.text(max_size=4)
TEXTS = st.sampled_from([*TRICKY, "auto", "theirs"]) | st.text(max_size=8)
NUMBERS = (
    st.sampled_from([0, -1, 2**63, 2**64, 10**40, 1.0, 1e2, -0.0, 1e-320, 0.1]) | st.integers() | st.floats(-1e9, 1e9)
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
OPTIONS: list[Any] = [
    *({}, {}, {"stream_options": {"include_usage": True}}, {"stream_options": {"include_usage": False}}),
    *({"stream_options": None}, {"stream_options": {"x": 1}}, {"stream_options": {"include_usage": True, "x": 10**40}}),
]
SCHEMA: Any = {"type": "object", "properties": {"model": {"type": "string", "default": "auto"}, "stream_options": {}}}
TOOLS: Any = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA, "model": "auto"}}]


@st.composite
def written(draw: st.DrawFn, value: Any) -> str:
    """Draw JSON in any style: spaces anywhere, characters escaped or not, numbers in odd spellings."""
    space = draw(st.sampled_from(["", "", " ", "\n\t", "\r\n "]))
    escaping = draw(st.sampled_from(["none", "ascii", "some"]))

    def text(string: str) -> str:
        plain = json.dumps(string, ensure_ascii=escaping != "none")
        if escaping == "some" and string[:1].isalpha() and string[:1].isascii():
            plain = f'"\\u{ord(string[0]):04x}' + json.dumps(string[1:])[1:]
        return plain.replace("/", "\\/") if escaping == "some" else plain

    def write(value: Any) -> str:
        if isinstance(value, dict):
            pairs = [f"{space}{text(name)}{space}:{space}{write(each)}{space}" for name, each in value.items()]
            return "{" + ",".join(pairs) + "}"
        if isinstance(value, list):
            return "[" + ",".join(space + write(each) for each in value) + "]"
        return text(value) if isinstance(value, str) else json.dumps(value)

    return space + write(value) + space


@st.composite
def shuffled(draw: st.DrawFn, body: dict[str, Any]) -> dict[str, Any]:
    return {name: body[name] for name in draw(st.permutations(sorted(body)))}


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    more = draw(st.dictionaries(NAMES.filter(lambda name: name.isascii()), VALUES, max_size=4))
    body = {**more, "model": draw(MODELS), "messages": draw(st.sampled_from([ASK, [{**ASK[0], "model": "auto"}]]))}
    if draw(st.booleans()):
        body["tools"] = TOOLS
    body.pop("stream", None)
    stream: dict[str, Any] = draw(st.sampled_from([{}, {"stream": True}, {"stream": False}, {"stream": None}]))
    options = draw(st.sampled_from(OPTIONS))
    return draw(shuffled({**body, **stream, **options}))


def exact(raw: bytes) -> str:
    """Parse so that a key given twice shows, and 1 is neither 1.0 nor true."""
    return repr(json.loads(raw, object_pairs_hook=lambda pairs: sorted(pairs, key=lambda pair: pair[0])))


@given(bodies(), MODELS, st.data())
@settings(max_examples=400, deadline=None)
@example({"messages": ASK, 'x"model': "auto", "model": "auto"}, "theirs", None)
@example({"model": "auto", "tools": TOOLS * 9, "messages": ASK}, "theirs", None)
def test_only_the_model_of_a_request_is_replaced(body: dict[str, Any], model: str, data: st.DataObject | None) -> None:
    raw = json.dumps(body).encode() if data is None else data.draw(written(body)).encode()
    try:
        request = parse_chat(raw, [])
    except BadRequest:  # a control field, a body that is refused for another reason
        assume(False)
        return
    sent = build_body(request.raw, request.body, model, stream=request.stream)
    expected = {**body, "model": model}
    if request.stream:
        expected["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
    else:
        expected.pop("stream_options", None)

    assert exact(sent) == exact(json.dumps(expected).encode())


@given(MODELS, st.sampled_from(["", " ", "\n  "]), st.booleans(), st.booleans())
@settings(deadline=None)
def test_all_bytes_but_the_model_are_the_callers(model: str, space: str, front: bool, stream: bool) -> None:
    """As the usual clients write it: the model first or last."""
    named = f'"model"{space}:{space}"auto"'
    numbers = f'"x":[1.0,1e2,{10**30}],"stream":{json.dumps(stream)}'
    rest = f'"messages":[{{"role":"user","content":"\\u00e9"}}],{space}{numbers}'
    raw = "{" + space + (f"{named},{rest}" if front else f"{rest},{named}") + space + "}"
    request = parse_chat(raw.encode(), [])
    sent = build_body(request.raw, request.body, model, stream=stream).decode()
    without_options = sent.replace('"stream_options":{"include_usage":true},', "", 1) if stream else sent

    assert without_options == raw.replace('"auto"', json.dumps(model, ensure_ascii=False))


@given(st.dictionaries(NAMES, VALUES, max_size=5), st.none() | MODELS, MODELS, st.data())
@settings(max_examples=400, deadline=None)
@example({'x"model': "theirs"}, "theirs", "ours", None)
@example({"choices": [{"model": "theirs"}], "big": 10**40}, "theirs", "ours", None)
@example({"big": 10**40}, None, "ours", None)
def test_only_the_model_of_a_response_is_replaced(
    body: dict[str, Any], named: str | None, model: str, data: st.DataObject | None
) -> None:
    body = {name: value for name, value in body.items() if name != "model"} | ({"model": named} if named else {})
    raw = (json.dumps(body) if data is None else data.draw(written(data.draw(shuffled(body)))).strip()).encode()
    read, kept = parse(raw)

    assert exact(JSONPayload(read, kept).with_model(model)) == exact(json.dumps({**body, "model": model}).encode())
    renamed = replace_model(raw, read, model)
    if renamed is not None:
        assert exact(renamed) == exact(json.dumps({**body, "model": model}).encode())


@pytest.mark.parametrize("name", ["choices", "delta"])
def test_a_completed_chunk_keeps_its_numbers(name: str) -> None:
    odd = {"choices": None} if name == "choices" else {"choices": [{"index": 0, "delta": None}]}
    (chunk,) = ChunkReader().feed(format_event({**odd, "big": 10**40}))

    assert json.loads(chunk.with_model("ours"))["big"] == 10**40


def test_dropping_usage_keeps_all_other_numbers() -> None:
    raw = json.dumps({"usage": {"total_tokens": 1}, "big": 10**40, "model": "theirs"}).encode()

    assert json.loads(JSONPayload(*parse(raw)).without("usage").with_model("ours")) == {"big": 10**40, "model": "ours"}


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        ({"max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": None}, {"max_tokens": 5}),
        ({"max_tokens": None, "max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": 7, "max_completion_tokens": 5}, {"max_tokens": 7}),
        ({"max_tokens": 7}, {"max_tokens": 7}),
        ({}, {}),
    ],
)
def test_of_two_names_for_one_limit_the_one_with_a_value_counts(body: Any, sent: Any) -> None:
    resolved = ResolvedProvider(
        "relay", "m", "mistral", "http://x/v1", param_aliases={"max_completion_tokens": "max_tokens"}
    )
    target = DirectTargets(Settings(), {}, Outbound({})).get(a_record(model="mistral/m"), resolved)
    whole = {"model": "auto", "messages": ASK, **body}

    assert json.loads(target.build_body(whole, json.dumps(whole).encode(), stream=False)) == {
        "model": "m",
        "messages": ASK,
        **sent,
    }


@pytest.mark.parametrize("stream", [False, True])
def test_a_models_parameters_do_not_decide_whether_it_streams(stream: bool) -> None:
    record = a_record(stream=not stream, temperature=0.5)
    target = DirectTargets(Settings(), {}, Outbound({})).get(
        record, ResolvedProvider("relay", "m", "openai", "http://x/v1")
    )
    body = {"model": "auto", "messages": ASK, **({"stream": True} if stream else {})}
    sent = json.loads(target.build_body(body, json.dumps(body).encode(), stream=stream))

    assert (bool(sent.get("stream")), sent["temperature"]) == (stream, 0.5)
