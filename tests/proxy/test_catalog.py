"""What the bundled price map knows, under which names; and broken maps."""

from __future__ import annotations

import subprocess
import sys

import pytest

from proxy.state.catalog import InvalidPriceMap, bundled_catalog, parse_price_map

ONE = {
    "gpt-x": {"litellm_provider": "openai", "input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6, "mode": "chat"}
}


@pytest.mark.parametrize("model", ["gpt-4o", "openai/gpt-4o", "azure/gpt-4o", "anthropic/claude-sonnet-4-6"])
def test_the_bundled_map_knows_the_usual_spellings(model: str) -> None:
    entry = bundled_catalog().find(model)
    assert entry is not None
    assert entry.price is not None
    assert entry.capabilities.tools is True
    assert (entry.capabilities.max_input_tokens or 0) >= 100_000


def test_bedrock_and_vertex_are_found_below_their_routes() -> None:
    catalog = bundled_catalog()
    assert catalog.find("bedrock/converse/anthropic.claude-sonnet-4-6") is not None
    assert catalog.find("vertex_ai/gemini-2.5-pro") is not None


def test_a_name_of_another_provider_is_not_taken() -> None:
    assert parse_price_map(ONE).find("openai/gpt-x") is not None
    assert parse_price_map(ONE).find("groq/gpt-x") is None
    assert parse_price_map(ONE).find("openai/unheard-of") is None


def test_a_zero_in_the_map_is_a_price_only_where_models_run_locally() -> None:
    ollama = bundled_catalog().find("ollama/llama3")
    assert ollama is not None
    assert ollama.price is not None
    assert ollama.price.input_cost_per_token == 0
    trial = bundled_catalog().find("gemini/gemini-exp-1206")
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
def test_one_broken_entry_refuses_the_whole_map(broken: object) -> None:
    with pytest.raises(InvalidPriceMap):
        parse_price_map(broken)


def test_reading_the_map_imports_no_litellm() -> None:
    program = (
        "import sys; from proxy.state.catalog import bundled_catalog as b; b(); sys.exit('litellm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_figures_and_modes_that_make_no_sense_are_unknown_and_break_nothing() -> None:
    listed = {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6, "max_input_tokens": 10**400}
    catalog = parse_price_map({"m": listed, "odd": {"mode": ["chat"]}})
    entry = catalog.find("m")
    assert entry is not None
    assert entry.capabilities.max_input_tokens is None
    assert len(catalog) == 1
