"""What is looked at of a long text."""

from __future__ import annotations

from router_core.embedding import CUT, excerpt


def test_a_text_that_fits_is_left_as_it_is() -> None:
    whole = " " + "a" * (2 * CUT - 2) + "\n"
    assert excerpt(whole) == whole


def test_a_long_text_keeps_its_two_ends() -> None:
    assert excerpt("a" * CUT + "b" + "c" * CUT) == "a" * CUT + "\n" + "c" * CUT


def test_blanks_around_a_long_text_are_not_its_ends() -> None:
    assert excerpt(" " * CUT + "a" * CUT + "\n" * CUT) == "a" * CUT
    assert excerpt("\n" * CUT + "a" * 2 * CUT + "b") == "a" * CUT + "\n" + "a" * (CUT - 1) + "b"
