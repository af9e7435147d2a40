from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from proxy.server.requests import RequestHeaders, headers_of

NAMES = ("host", "x-api-key", "lambda", "origin")
RAW = st.lists(st.tuples(st.sampled_from([name.encode() for name in NAMES]), st.binary(max_size=3)), max_size=6)


@given(RAW)
def test_every_value_of_a_name_is_found_in_order(raw: list[tuple[bytes, bytes]]) -> None:
    head, theirs = RequestHeaders(raw), Headers(raw=raw)

    assert {name: head.getlist(name) for name in NAMES} == {name: theirs.getlist(name) for name in NAMES}
    assert sorted(head.items_for(NAMES)) == sorted(theirs.items())


def test_it_is_put_together_once_a_request() -> None:
    scope = {"type": "http", "headers": [(b"host", b"a")]}

    assert headers_of(scope) is headers_of(scope)
