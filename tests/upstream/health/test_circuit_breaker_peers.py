from __future__ import annotations

import pytest

from tests.upstream.health.makers import started
from tests.upstream.health.test_circuit_breaker import FAILED, a_breaker, an_open_one, fail


def test_a_peers_cooldown_ends_with_a_probe_and_doubles_when_that_fails() -> None:
    breaker = a_breaker()
    breaker.open_from_peer(40.0, "said elsewhere", 0.0)
    assert breaker.unavailable_s(0.0) == 40.0
    assert breaker.open_count == 0
    probe = started(breaker, 40.0)
    assert probe.is_probe
    breaker.failed(probe, FAILED, 41.0)
    assert breaker.cooldown_s(41.0) == 80.0


def test_a_probe_that_succeeds_during_a_peers_cooldown_is_followed_by_another() -> None:
    breaker = an_open_one()
    probe = started(breaker, 10.0)
    breaker.open_from_peer(5.0, "said elsewhere", 11.0)
    breaker.succeeded(probe, 12.0)
    assert breaker.cooldown_s(12.0) == 4.0
    assert started(breaker, 16.0).is_probe


@pytest.mark.parametrize("found_first", [True, False])
def test_closing_for_a_peer_leaves_open_what_was_found_here(found_first: bool) -> None:
    breaker = a_breaker()
    if found_first:
        fail(breaker, 5)
    breaker.open_from_peer(200.0, "said elsewhere", 0.0)
    breaker.close_from_peer()
    assert breaker.closed is not found_first
    assert breaker.cooldown_s(0.0) == (10.0 if found_first else 0.0)


def test_a_peers_cooldown_is_no_longer_than_the_longest() -> None:
    breaker = a_breaker()
    breaker.open_from_peer(1e9, "said elsewhere", 0.0)
    assert breaker.cooldown_s(0.0) == 300.0
