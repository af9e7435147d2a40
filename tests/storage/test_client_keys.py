from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from proxy.storage.client_keys import NO_LIMITS, ClientKey, InvalidKey, KeyChange, KeyLimits
from proxy.storage.records import InvalidRecord

OLD = ClientKey("id", "team", "0a", 1.0)
WHOLE = ClientKey(
    *("id", "team", "0a", 1_700_000_000.0, ("small",), False, KeyLimits(60, 100_000, 1.5, 20.0)),
    *("viewer", 1_800_000_000.0, 0.2, 0.1, 0.5, "0b", 1_700_000_060.0),
)


def stored(**changes: Any) -> str:
    return json.dumps({**json.loads(WHOLE.to_json()), **changes})


def test_a_key_comes_back_with_all_its_fields() -> None:
    assert ClientKey.from_json("id", WHOLE.to_json()) == WHOLE


def test_a_record_of_an_earlier_version_is_read() -> None:
    text = '{"id": "id", "name": "team", "digest": "0a", "created_at": 1.0, "models": ["small"], "revoked": false}'
    assert ClientKey.from_json("id", text) == replace(OLD, models=("small",))
    assert OLD.limits == NO_LIMITS
    assert (OLD.role, OLD.expires_at) == ("client", None)


@pytest.mark.parametrize(
    "change",
    [
        *({"digest": None}, {"digest": ""}, {"digest": "ä"}, {"digest": 7}, {"created_at": None}, {"created_at": "1"}),
        *({"models": "small"}, {"models": [1]}, {"models": {}}, {"revoked": 0}, {"revoked": None}, {"name": None}),
        *({"role": "root"}, {"role": None}, {"role": ["admin"]}, {"expires_at": "never"}, {"expires_at": -1}),
        *({"expires_at": float("nan")}, {"expires_at": True}, {"expires_at": 10**400}),
        *({"lambda_min": -0.1}, {"lambda_max": float("inf")}, {"lambda_default": "0.1"}, {"lambda_min": 10**400}),
        *({"lambda_min": 0.6}, {"lambda_default": 0.05}, {"lambda_default": 0.51}),
        *({"previous_digest": None}, {"previous_until": None}, {"previous_until": "soon"}),
        *({"limits": []}, {"limits": 3}, {"limits": {"requests_per_hour": 1}}, {"allowed_from": "10.0.0.0/8"}),
    ],
)
def test_a_record_with_unknown_fields_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidRecord):
        ClientKey.from_json("id", stored(**change))


@pytest.mark.parametrize("limit", ["requests_per_minute", "tokens_per_minute", "usd_per_day", "usd_per_month"])
@pytest.mark.parametrize("value", [-1, True, "5", [1]])
def test_an_invalid_limit_is_refused(limit: str, value: Any) -> None:
    with pytest.raises(InvalidKey, match=limit) as caught:
        ClientKey.from_json("id", stored(limits={limit: value}))
    assert caught.value.param == limit


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400])
def test_a_limit_that_json_cannot_hold_is_refused(value: float) -> None:
    with pytest.raises(InvalidRecord):
        ClientKey.from_json("id", stored(limits={"usd_per_day": value}))


@pytest.mark.parametrize(("limit", "value"), [("requests_per_minute", 0), ("tokens_per_minute", 1.5)])
def test_a_rate_limit_is_a_whole_number_of_one_or_more(limit: str, value: float) -> None:
    with pytest.raises(InvalidKey):
        ClientKey.from_json("id", stored(limits={limit: value}))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"ur-x"', "{}", "[" * 100_000])
def test_a_text_that_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(InvalidRecord):
        ClientKey.from_json("id", text)


def test_an_error_names_the_field_the_value_and_the_fix_but_no_digest() -> None:
    with pytest.raises(InvalidKey, match=r"`role` must be one of client, viewer, admin; got 'boss'"):
        replace(WHOLE, role="boss")  # type: ignore[arg-type]
    with pytest.raises(InvalidKey) as caught:
        replace(WHOLE, digest="canary-ä")
    assert "canary" not in str(caught.value)
    assert "0a" not in repr(OLD)


def test_the_secret_before_a_rotation_is_valid_until_its_grace_period_ends() -> None:
    assert WHOLE.matches("0a", 1e10)
    assert WHOLE.matches("0b", 1_700_000_059.9)
    assert not WHOLE.matches("0b", 1_700_000_060.0)
    assert not WHOLE.matches("0c", 0.0)
    assert not OLD.matches("0b", 0.0)


def test_a_key_expires_at_its_time_and_one_without_a_time_never() -> None:
    assert [WHOLE.expired(1_800_000_000.0 + late) for late in (-0.1, 0.0, 1.0)] == [False, True, True]
    assert not OLD.expired(1e11)


def test_a_change_replaces_only_its_own_fields() -> None:
    changed = KeyChange({"role": "admin", "lambda_max": None}, {"usd_per_day": None}).apply_to(WHOLE)
    limits = KeyLimits(60, 100_000, None, 20.0)
    assert changed == replace(WHOLE, role="admin", lambda_max=None, limits=limits)
