from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from proxy.settings.model_config import resolve_secret
from proxy.settings.schema import Settings, load_settings
from proxy.storage.price_map import bundled_price_map
from tests.test_house import ROOT

EXAMPLES = sorted((ROOT / "deploy" / "examples").glob("*.yaml"))
every_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


def test_there_are_two() -> None:
    assert [path.stem for path in EXAMPLES] == ["ollama", "openai-anthropic-vllm"]


@every_example
def test_it_loads_without_a_warning(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        settings = load_settings(path, {})
    assert len(settings.model_list) >= 3
    assert caplog.messages == []


@every_example
def test_the_default_model_is_one_of_its_models(path: Path) -> None:
    settings = load_settings(path, {})
    assert settings.default_model in {entry.model_name for entry in settings.model_list}


def references(settings: Settings) -> list[str]:
    return [str(entry.litellm_params["api_key"]) for entry in settings.model_list if "api_key" in entry.litellm_params]


@every_example
def test_every_key_is_a_reference_that_the_compose_file_hands_on(path: Path) -> None:
    compose = (ROOT / "deploy" / "compose.yaml").read_text("utf-8")
    for reference in references(load_settings(path, {})):
        name = reference.removeprefix("os.environ/")
        assert resolve_secret(reference, {name: "sk-test"}) == "sk-test"
        assert re.search(rf"^ +{name}:$", compose, re.MULTILINE)


@every_example
def test_every_model_has_a_price_or_costs_nothing(path: Path) -> None:
    price_map = bundled_price_map()
    for entry in load_settings(path, {}).model_list:
        listed = price_map.find(entry.litellm_params["model"])
        priced = entry.model_info.free or entry.model_info.input_cost_per_token is not None
        assert priced or (listed is not None and listed.price is not None), entry.model_name
