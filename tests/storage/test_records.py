from __future__ import annotations

import pytest

from proxy.storage.client_keys import ClientKey
from proxy.storage.records import CurrentPrice, InvalidRecord, ModelRecord, StoredProfile
from router_core.errors import InvalidPrice
from router_core.types import PRICE_FIELDS, Price
from tests.support.makers import a_profile, a_record


def test_a_record_comes_back_as_it_was_stored() -> None:
    record = a_record(api_key="os.environ/SMALL_API_KEY")
    assert ModelRecord.from_json("small", record.to_json()) == record


def test_the_fingerprint_follows_what_decides_answers_and_not_the_key() -> None:
    record = a_record(api_key="os.environ/A_API_KEY")
    assert a_record(api_key="os.environ/B_API_KEY").fingerprint == record.fingerprint
    assert a_record(api_key="os.environ/A_API_KEY", temperature=1.5).fingerprint != record.fingerprint


def test_a_record_never_shows_its_key() -> None:
    assert "canary" not in repr(a_record(api_key="canary"))


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{", "null", '{"litellm_params": 3}', '{"litellm_params": {}}', "[" * 100_000),
        '{"litellm_params": {"model": "m"}, "model_info": {"max_input_tokens": 1%s}}' % ("0" * 30),
    ],
)
def test_a_broken_record_is_refused(text: str) -> None:
    with pytest.raises(InvalidRecord):
        ModelRecord.from_json("small", text)


def test_a_price_comes_back_as_it_was_stored() -> None:
    live = CurrentPrice(Price(1e-7, 3e-7, cache_read_input_token_cost=5e-8), "admin", 1_700_000_000.5)
    assert CurrentPrice.from_fields(live.to_fields(), seen_at=0) == live


def test_a_price_with_tiers_comes_back_as_it_was_stored_and_keeps_its_names() -> None:
    members = {**dict.fromkeys(PRICE_FIELDS, 1e-6), "cache_read_input_token_cost_above_272k_tokens": 2e-6}
    fields = CurrentPrice(Price.from_fields(members), "sync", 1.0).to_fields()
    assert fields["cache_read_input_token_cost_above_272k_tokens"] == "2e-06"
    assert CurrentPrice.from_fields(fields, seen_at=0).price == Price.from_fields(members)


def test_a_foreign_price_without_source_or_time_is_external_and_dated_when_read() -> None:
    live = CurrentPrice.from_fields({"input_cost_per_token": "1e-7", "output_cost_per_token": "3e-7"}, seen_at=42.0)
    assert (live.source, live.updated_at) == ("external", 42.0)


@pytest.mark.parametrize("amount", ["nan", "-1", "inf", "", "free", "1e309", "1e300"])
def test_a_price_that_is_no_amount_is_refused(amount: str) -> None:
    with pytest.raises(InvalidPrice):
        CurrentPrice.from_fields({"input_cost_per_token": amount, "output_cost_per_token": "1e-6"}, seen_at=0)


def test_a_stored_profile_comes_back_with_its_sums() -> None:
    entry = StoredProfile("abc", a_profile(), "job")
    back = StoredProfile.from_json(entry.to_json())
    assert (back.fingerprint, back.job) == ("abc", "job")
    assert back.profile.error_sums.tolist() == entry.profile.error_sums.tolist()


def test_a_key_comes_back_and_its_models_must_be_a_list() -> None:
    key = ClientKey("id", "team", "00ff", 1.0, ("small",))
    assert ClientKey.from_json("id", key.to_json()) == key
    with pytest.raises(InvalidRecord):
        ClientKey.from_json("id", '{"digest": "00", "created_at": 1, "models": "small"}')
