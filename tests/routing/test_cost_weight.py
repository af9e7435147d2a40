from __future__ import annotations

from typing import Any

import pytest

from proxy.errors import BadRequest, Forbidden
from proxy.routing.chat_request import ChatRequest, RoutingOptions
from proxy.routing.cost_weight import ALIASES, RoutingMode, cost_weight, key_allows_mode
from proxy.storage.client_keys import ClientKey


def weight(name: str = "auto", requested: float | None = None, **bounds: Any) -> float:
    key = ClientKey("k", "team", "0a", 0.0, **bounds) if bounds else None
    request = ChatRequest({}, name, False, False, RoutingOptions(lambda_=requested))
    return cost_weight(request, ALIASES.get(name, RoutingMode.PINNED), 0.1, key)


def test_the_request_comes_before_the_key_and_the_key_before_the_default() -> None:
    assert weight() == 0.1
    assert weight(lambda_default=0.3) == 0.3
    assert weight(requested=0.7, lambda_default=0.3) == 0.7
    assert weight(lambda_default=0.0) == 0.0


def test_what_nobody_stated_is_moved_within_the_bounds() -> None:
    assert weight(lambda_min=0.5) == 0.5
    assert weight(lambda_max=0.05) == 0.05
    assert weight(lambda_min=0.05, lambda_max=0.5) == 0.1


@pytest.mark.parametrize("requested", [0.2, 0.35, 0.5])
def test_the_bounds_are_within_them(requested: float) -> None:
    assert weight(requested=requested, lambda_min=0.2, lambda_max=0.5) == requested


@pytest.mark.parametrize(
    ("requested", "bounds", "words"),
    [
        (0.19, {"lambda_min": 0.2, "lambda_max": 0.5}, "`lambda` is 0.19; for this key it is from 0.2 to 0.5"),
        (0.51, {"lambda_min": 0.2, "lambda_max": 0.5}, "from 0.2 to 0.5"),
        (0.0, {"lambda_min": 0.2}, "0.2 or more"),
        (1e300, {"lambda_max": 1.0}, "from 0 to 1"),
    ],
)
@pytest.mark.parametrize("name", ["auto", "a-model"])
def test_a_stated_value_outside_the_bounds_is_refused_by_name(
    name: str, requested: float, bounds: dict[str, float], words: str
) -> None:
    with pytest.raises(BadRequest, match=words) as caught:
        weight(name, requested, **bounds)
    assert caught.value.param == "lambda"


def test_the_names_that_stand_for_a_value_obey_the_bounds_too() -> None:
    assert weight("uniroute/best", 0.4) == 0.0
    assert weight("uniroute/best", lambda_max=1.0, lambda_default=0.5) == 0.0
    assert weight("uniroute/cheap", lambda_min=0.2) == 0.2
    with pytest.raises(Forbidden, match=r"'uniroute/best' asks for λ = 0; for this key λ is 0.2 or more"):
        weight("uniroute/best", lambda_min=0.2)
    with pytest.raises(Forbidden, match=r"'uniroute/cheap' asks for the cheapest model.*from 0 to 9"):
        weight("uniroute/cheap", lambda_max=9.0)


def test_only_the_names_that_the_bounds_leave_room_for_may_be_asked() -> None:
    low, high = ClientKey("k", "n", "0a", 0.0, lambda_min=0.1), ClientKey("k", "n", "0a", 0.0, lambda_max=0.1)
    assert [key_allows_mode(RoutingMode.BEST, key) for key in (None, low, high)] == [True, False, True]
    assert [key_allows_mode(RoutingMode.CHEAP, key) for key in (None, low, high)] == [True, True, False]
    assert all(key_allows_mode(RoutingMode.SCORED, key) for key in (None, low, high))
