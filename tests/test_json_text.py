from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.json_text import MAX_DEPTH, MAX_VALUES, SMALL_BYTES, JSONSizeCounter, JSONTooLarge, check_limits

TEXTS = st.text(st.sampled_from('"\\[]{},:aé\n'), max_size=6)
DOCUMENTS = st.recursive(
    st.none() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


def count(value: Any) -> tuple[int, int]:
    """Count values, and of them the lists and objects that are empty."""
    if isinstance(value, dict):
        inner = [count(each) for pair in value.items() for each in pair]
    elif isinstance(value, list):
        inner = [count(each) for each in value]
    else:
        return 1, 0
    return 1 + sum(values for values, _ in inner), sum(empty for _, empty in inner) or int(not value)


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


@given(DOCUMENTS, st.booleans(), st.data())
@settings(max_examples=300, deadline=None)
def test_values_are_counted_however_the_text_is_split(document: Any, ascii_only: bool, data: st.DataObject) -> None:
    raw = json.dumps(document, ensure_ascii=ascii_only).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=5)))
    shape = JSONSizeCounter()
    for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        shape.feed(raw[start:end])
    values, empty = count(document)

    assert shape.values == values + empty


@given(DOCUMENTS, st.integers(MAX_DEPTH - 4, MAX_DEPTH + 2))
@settings(max_examples=300, deadline=None)
def test_levels_are_counted_and_brackets_in_strings_are_not(document: Any, around: int) -> None:
    raw = b"[" * around + json.dumps(document).encode() + b"]" * around
    shape = JSONSizeCounter()
    if around + depth(document) > MAX_DEPTH:
        with pytest.raises(JSONTooLarge, match="nested deeper"):
            shape.feed(raw)
    else:
        shape.feed(raw)


FLOODS = [b"[],", b"{},", b'"",', b"1,", b'{"a":1},', b'"', b"[", b"[]", b'""', b'"\\"",', b"[[[[]]]],"]


@pytest.mark.parametrize("flood", FLOODS)
def test_too_many_values_are_refused_before_they_are_parsed(flood: bytes) -> None:
    with pytest.raises(JSONTooLarge):
        check_limits(b"[" + flood * (2 * MAX_VALUES + 2))


@pytest.mark.parametrize("filling", [b"x", b"\\n", b'\\"', b"\\\\", b"[", b"{,:", "字".encode()])
def test_one_long_string_is_one_value(filling: bytes) -> None:
    raw = b'{"a":"' + filling * (3 * SMALL_BYTES // len(filling)) + b'"}'
    shape = JSONSizeCounter()
    shape.feed(raw)

    assert shape.values == count(json.loads(raw))[0]


def test_small_flat_texts_are_not_counted() -> None:
    check_limits(b'{"a":[' + b"1," * 1000 + b"1]}")
    with pytest.raises(JSONTooLarge, match="nested deeper"):
        check_limits(b"[" * 300 + b"]" * 300)
