from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.errors import BadRequest
from proxy.json_text import MAX_DEPTH, MAX_VALUES
from proxy.routing.json_body import parse_fast, parse_strict
from proxy.routing.requirements import requirements_of
from tests.routing.test_json_body_properties import BODIES, NAMES, VALUES

TEXTS = st.text(st.sampled_from('":\\, {}[]a\u00fc\u6f22\U0001f600\n\x7f0'), max_size=8)
KEYS = NAMES | TEXTS
NUMBERS = st.sampled_from(
    [
        *("-0", "-0.0", "0.0", "1e3", "1E400", "-1e999", "1e-400", "9007199254740993", "9223372036854775808", "-1"),
        *("18446744073709551615", "18446744073709551616", "-9223372036854775809", "1e19", "12345678901234567890.5"),
        *("0.1", "2.5e-8", "1.7976931348623157e308", "NaN", "-Infinity", "1_0", "+1", ".5", "01", "9" * 5000),
    ]
)
PIECES = st.sampled_from([b'"', b":", b"\\", b",", b'"a":', b" ", b"\xff", b"\xed\xa0\x80", b"e9", b"}"])
SPACES = st.sampled_from(["", "", "", " ", "\n", "\t ", "\r", "\u00a0", "\x0b", "/**/"])


@st.composite
def written(draw: st.DrawFn, depth: int = 3) -> str:
    """Draw JSON, or nearly JSON, as no library writes it."""
    kind = draw(st.integers(0, 4 if depth else 2))
    if kind == 0:
        return draw(NUMBERS | st.sampled_from(["null", "true", "false", "nul"]))
    if kind <= 2:
        return draw(_quoted())
    spaced, inner = draw(SPACES), written(depth - 1)
    if kind == 3:
        return f"[{spaced}{','.join(draw(st.lists(inner, max_size=3)))}]"
    pairs = draw(st.lists(st.tuples(_quoted(), SPACES, SPACES, inner), max_size=3))
    return f"{{{spaced}{f',{spaced}'.join(f'{key}{before}:{after}{value}' for key, before, after, value in pairs)}}}"


@st.composite
def _quoted(draw: st.DrawFn) -> str:
    """Quote a text, with some of its characters written as escapes."""
    text = draw(KEYS)
    escaped = draw(st.sets(st.sampled_from(text), max_size=2)) if text else set()
    plain = json.dumps(text, ensure_ascii=draw(st.booleans()))
    for character in escaped - set('"\\\n'):
        plain = plain.replace(character, f"\\u{ord(character):04{draw(st.sampled_from('xX'))}}"[:6])
    return plain + draw(st.sampled_from(["", "", "", "", '\\"', "\\ud800"]))


def exact(raw: bytes) -> dict[str, Any] | None:
    try:
        return parse_strict(raw)
    except BadRequest:
        return None


def assert_alike(raw: bytes) -> None:
    read, wanted = parse_fast(raw), exact(raw)
    if read is not None:
        assert wanted is not None
        assert repr(read.document) == repr(wanted)  # 1, 1.0 and True are one another's equals
        if isinstance(wanted.get("messages"), list):  # what else it may be is refused
            assert requirements_of(wanted, read.contents) == requirements_of(wanted)


def agent_body() -> bytes:
    parts = [{"type": "text", "text": "see: this"}, {"type": "image_url", "image_url": {"url": "data:image/png;x"}}]
    call = {"id": "call_1", "function": {"name": "f", "arguments": '{"a": "b: c"}'}}
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    return json.dumps({"model": "auto", "messages": messages, "tools": [{"parameters": {"default": 1.5}}]}).encode()


@given(written(depth=4).map(lambda text: f'{{"model":"auto",{text[1:]}' if text.startswith('{"') else text))
@example('{"a":1,"a":2}')
@example('{"a" :1, "a":2}')
@example('{"a": ":", "a": 1}')
@example('{"a": "\\u003a", "a": 1}')
@example('{"a": ["\\u003A"], "b": {"x": 1, "\\u0078": 2}}')
@example('{"a": {"b": ":::"}, "a": {"b": 0}}')
@example('\ufeff{"a": 1}')
@example('{"a": 12345678901234567890123}')
@settings(max_examples=500, deadline=None)
def test_the_fast_parser_reads_what_the_strict_one_reads(text: str) -> None:
    assert_alike(text.encode("utf-8", "surrogatepass"))


@given(BODIES, st.booleans(), st.sampled_from([None, 1]))
@settings(max_examples=300, deadline=None)
def test_bodies_are_read_and_counted_alike(body: dict[str, Any], ascii_only: bool, indent: int | None) -> None:
    assert_alike(json.dumps(body, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass"))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_body_with_bytes_put_in_or_out_is_read_alike(data: st.DataObject) -> None:
    raw = agent_body()
    for _ in range(data.draw(st.integers(1, 3))):
        place, length = data.draw(st.integers(0, len(raw))), data.draw(st.integers(0, 3))
        piece = data.draw(
            st.sampled_from([b'"', b":", b"\\", b",", b'"a":', b" ", b"\xff", b"\xed\xa0\x80", b"e9", b"}"])
        )
        raw = raw[:place] + piece + raw[place + length :]
    assert_alike(raw)


@given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=3), st.data())
@settings(max_examples=300, deadline=None)
def test_the_fast_parser_takes_no_key_given_twice(value: dict[str, Any], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(value)))
    pairs = [*value.items(), (key, data.draw(VALUES))]
    space = data.draw(st.sampled_from(["", " ", "\n"]))
    text = ",".join(
        f"{json.dumps(name)}{space}:{json.dumps(member)}" for name, member in data.draw(st.permutations(pairs))
    )

    assert parse_fast(f'{{"outer": [{{{text}}}]}}'.encode()) is None


def test_the_fast_parser_takes_usual_bodies() -> None:
    assert parse_fast(agent_body()) is not None
    assert parse_fast(b'{"model": "auto", "messages": [{"role": "user", "content": "what: is \\" this \\\\"}]}')


@pytest.mark.parametrize("inner", [b"%s", b"[%s]", b'{"a": %s}', b'[{"a": [%s]}]'])
@pytest.mark.parametrize("name", [b"messages", b"tools", b"x"])
def test_the_fast_parser_takes_as_many_levels_and_values_as_the_strict_one(name: bytes, inner: bytes) -> None:
    for levels in range(MAX_DEPTH - 6, MAX_DEPTH + 3):
        for leaf in (b"1", b"[]", b"{}", b'{"a": 1}'):
            nested = b'{"%s": %s}' % (name, b"[" * levels + inner % leaf + b"]" * levels)
            assert exact(nested) is not None or parse_fast(nested) is None
    for count in range(MAX_VALUES - 4, MAX_VALUES + 2):
        many = b'{"%s": %s}' % (name, inner % (b"[" + b",".join([b"1"] * count) + b"]"))
        assert (exact(many) is None) == (parse_fast(many) is None)
