from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from proxy.settings.model_config import ModelInfo
from proxy.storage.price_map import InvalidPriceMap, PriceMapEntry, bundled_price_map, parse_price_map
from proxy.storage.snapshot import capabilities_of, unstored_price
from router_core.types import CAPABILITY_NAMES, Capabilities, Price

ONE = {
    "gpt-x": {"litellm_provider": "openai", "input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6, "mode": "chat"}
}


@pytest.mark.parametrize("model", ["gpt-4o", "openai/gpt-4o", "azure/gpt-4o", "anthropic/claude-sonnet-4-6"])
def test_the_bundled_map_knows_the_usual_spellings(model: str) -> None:
    entry = bundled_price_map().find(model)
    assert entry is not None
    assert entry.price is not None
    assert entry.capabilities.tools is True
    assert (entry.capabilities.max_input_tokens or 0) >= 100_000


def test_names_of_bedrock_and_vertex_are_found_below_their_routes() -> None:
    price_map = bundled_price_map()
    assert price_map.find("bedrock/converse/anthropic.claude-sonnet-4-6") is not None
    assert price_map.find("vertex_ai/gemini-2.5-pro") is not None


def test_the_entry_of_another_provider_is_not_used() -> None:
    assert parse_price_map(ONE).find("openai/gpt-x") is not None
    assert parse_price_map(ONE).find("groq/gpt-x") is None
    assert parse_price_map(ONE).find("openai/unheard-of") is None


def test_a_zero_in_the_map_is_a_price_only_where_models_run_locally() -> None:
    ollama = bundled_price_map().find("ollama/llama3")
    assert ollama is not None
    assert ollama.price is not None
    assert ollama.price.input_cost_per_token == 0
    trial = bundled_price_map().find("gemini/gemini-exp-1206")
    assert trial is not None
    assert trial.price is None


@pytest.mark.parametrize(
    "broken",
    [
        [],
        {},
        {"gpt-x": 3},
        ONE | {"y": {"input_cost_per_token": "1e-6", "output_cost_per_token": 1}},
        ONE | {"y": {"input_cost_per_token": -1, "output_cost_per_token": 1}},
        ONE | {"y": {"input_cost_per_token": float("nan"), "output_cost_per_token": 1}},
    ],
)
def test_one_broken_entry_makes_the_whole_map_invalid(broken: object) -> None:
    with pytest.raises(InvalidPriceMap):
        parse_price_map(broken)


def test_reading_the_map_imports_no_litellm() -> None:
    program = (
        "import sys; from proxy.storage.price_map import bundled_price_map as b; b();sys.exit('litellm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_odd_numbers_and_modes_are_unknown() -> None:
    listed = {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6, "max_input_tokens": 10**400}
    price_map = parse_price_map({"m": listed, "odd": {"mode": ["chat"]}})
    entry = price_map.find("m")
    assert entry is not None
    assert entry.capabilities.max_input_tokens is None
    assert len(price_map) == 1


def known_of(**listed: Any) -> Capabilities:
    entry = parse_price_map({"m": {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6, **listed}}).find("m")
    assert entry is not None
    return entry.capabilities


@pytest.mark.parametrize(
    ("field", "ability"),
    [
        ("supports_function_calling", "tools"),
        ("supports_parallel_function_calling", "parallel_tools"),
        ("supports_vision", "vision"),
        ("supports_video_input", "video"),
        ("supports_audio_input", "audio_input"),
        ("supports_audio_output", "audio_output"),
        ("supports_pdf_input", "files"),
        ("supports_response_schema", "json_schema"),
        ("supports_reasoning", "reasoning"),
    ],
)
@pytest.mark.parametrize("value", [True, False, None, "yes"])
def test_each_capability_is_a_flag_or_unknown(field: str, ability: str, value: object) -> None:
    expected = value if isinstance(value, bool) else None

    assert known_of(**{field: value}) == Capabilities(**{ability: expected})


def test_a_list_of_modalities_fills_in_missing_flags() -> None:
    listed = known_of(supported_modalities=["text", "image"], supported_output_modalities=["text"])

    assert (listed.vision, listed.video, listed.audio_input, listed.audio_output) == (True, False, False, False)
    assert known_of(supported_modalities=["text"], supports_vision=True).vision is True
    assert known_of(supported_modalities="image").vision is None


def test_a_model_whose_parallel_calls_can_be_turned_off_supports_them() -> None:
    assert known_of(supports_parallel_tool_use_config=True).parallel_tools is True
    denied = known_of(supports_parallel_tool_use_config=True, supports_parallel_function_calling=False)
    assert denied.parallel_tools is False


def test_the_old_name_of_a_limit_is_the_window_only_where_it_is_not_the_output() -> None:
    assert known_of(max_tokens=100).max_input_tokens == 100
    assert known_of(max_tokens=100, max_output_tokens=100).max_input_tokens is None
    assert known_of(max_tokens=100, max_input_tokens=50).max_input_tokens == 50


def test_the_bundled_map_has_models_with_every_capability() -> None:
    known = [entry.capabilities for entry in bundled_price_map()]

    assert all(any(getattr(each, ability) is True for each in known) for ability in CAPABILITY_NAMES)


def test_model_info_wins_over_the_map_for_every_capability() -> None:
    known = PriceMapEntry("openai", None, Capabilities(**dict.fromkeys(CAPABILITY_NAMES, False)))
    capabilities: Any = {name: True for name in ModelInfo.model_fields if name.startswith("supports_")}

    assert capabilities_of(ModelInfo(), known) == known.capabilities
    assert capabilities_of(ModelInfo(**capabilities), known) == Capabilities(**dict.fromkeys(CAPABILITY_NAMES, True))


def test_the_bundled_map_knows_the_prices_of_long_prompts() -> None:
    gemini, qwen = (
        bundled_price_map().find(name) for name in ("gemini/gemini-2.5-pro", "dashscope/qwen-plus-2025-07-28")
    )
    assert gemini is not None
    assert gemini.price is not None
    assert qwen is not None
    assert qwen.price is not None
    assert [gemini.price.at(tokens).input_cost_per_token for tokens in (200_000, 200_001)] == [1.25e-6, 2.5e-6]
    assert [qwen.price.at(tokens).output_cost_per_reasoning_token for tokens in (1, 256_001)] == [4e-6, 1.2e-5]
    assert sum(bool(entry.price and entry.price.tiers) for entry in bundled_price_map()) > 200


def test_a_missing_price_of_a_listed_tier_is_its_input_price() -> None:
    tiers = [
        {
            "range": [0, 10],
            "input_cost_per_token": 1.0,
            "output_cost_per_token": 2.0,
            "cache_read_input_token_cost": 0.1,
        },
        {"range": [10, 20], "input_cost_per_token": 3.0, "output_cost_per_token": 4.0},
    ]
    entry = parse_price_map({"x": {"mode": "chat", "tiered_pricing": tiers}}).find("x")
    assert entry is not None
    assert entry.price is not None
    assert entry.price.at(11).cache_read_input_token_cost == 3.0


@pytest.mark.parametrize("tiers", ["odd", [3], [{"range": [0, 1]}], [{"range": "x", "input_cost_per_token": 1.0}], []])
def test_an_unreadable_list_of_tiers_is_no_price(tiers: Any) -> None:
    entry = parse_price_map(ONE | {"x": {"tiered_pricing": tiers}}).find("x")
    assert entry is not None
    assert entry.price is None


def test_entries_that_say_the_same_share_one_object() -> None:
    for name in ("capabilities", "thinking", "price"):
        values = [getattr(entry, name) for entry in bundled_price_map()]
        assert len(set(map(id, values))) == len(set(values)) < len(values) / 3


def test_a_partial_price_is_completed_from_the_map() -> None:
    known = parse_price_map(ONE).find("gpt-x")
    price = unstored_price(ModelInfo(cache_read_input_token_cost=1e-7), known)
    assert price is not None
    assert price.price == Price(1e-6, 2e-6, cache_read_input_token_cost=1e-7)
    assert unstored_price(ModelInfo(cache_read_input_token_cost=1e-7), None) is None
