"""Check what a soak concludes from its rows. The soak itself is run by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.bench.process_facts import Facts
from tests.bench.soak import OF_ONE_REQUEST, growth, verdicts

MIB = 2**20
AT_REST = Facts(2_000, 300 * MIB, 280 * MIB, 250 * MIB, descriptors=24, sockets=12, tasks=10)


def rows(mib_per_row: float, count: int = 20) -> list[Facts]:
    """Build rows of 5,000 requests, whose first half grows by a lot and whose last half by so much each."""
    half = count // 2
    grown = [10 * MIB * min(row, half) + mib_per_row * MIB * max(0, row - half) for row in range(count)]
    under_load = [
        replace(AT_REST, requests=2_000 + 5_000 * (row + 1), resident=int(300 * MIB + more), descriptors=60)
        for row, more in enumerate(grown)
    ]
    return [AT_REST, *under_load, replace(AT_REST, requests=102_000)]


def test_memory_that_is_filled_once_is_no_growth() -> None:
    assert growth(rows(0.0)) == pytest.approx(0.0, abs=1e-6)
    assert verdicts(rows(0.0)) == []


def test_growth_is_told_as_a_share_of_what_is_resident() -> None:
    assert growth(rows(1.0)) == pytest.approx(100 * 20 / 404.5, rel=0.01)
    assert "memory grew" in verdicts(rows(1.0))[0]


@pytest.mark.parametrize(("name", "own"), [("descriptors", OF_ONE_REQUEST), ("sockets", OF_ONE_REQUEST), ("tasks", 0)])
def test_what_does_not_come_back_is_named(name: str, own: int) -> None:
    before, *middle, after = rows(0.0)
    left = replace(after, **{name: getattr(after, name) + own + 1})

    assert verdicts([before, *middle, left])[0].startswith(name)
