"""The README lists what there is: every setting with its default, every command, every name it documents."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer

from proxy.cli import app
from proxy.settings.schema import CircuitBreakerSettings, ProfileSettings, Settings, load_settings, setting_names
from proxy.storage.redis import PRICING, price_key

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
ROWS = dict(re.findall(r"^\| `([^`]+)` \| ([^|]*) \|", README, re.MULTILINE))


GROUPS = {"profile": ProfileSettings.model_fields, "breaker": CircuitBreakerSettings.model_fields}


def documented_settings() -> list[str]:
    plain = [name for name in setting_names() if name not in GROUPS]
    return [*plain, *(f"{group}.{name}" for group, names in GROUPS.items() for name in names)]


@pytest.mark.parametrize("name", documented_settings())
def test_every_setting_is_listed(name: str) -> None:
    assert name in ROWS


@pytest.mark.parametrize("name", sorted({*documented_settings()} - {"model_list", "reference_price", "data_dir"}))
def test_the_listed_default_is_the_default(name: str) -> None:
    listed = ROWS[name].strip().strip("`")
    default = default_of(name)
    if listed in ("none", "LiteLLM's map"):
        assert default in (None, ())
    elif isinstance(default, bool):
        assert listed == str(default).lower()
    elif isinstance(default, int | float):
        assert float(listed) == default
    else:
        assert listed == (default if isinstance(default, str) else ", ".join(default))


def default_of(name: str) -> Any:
    settings = load_settings(None, {})
    group, _, field = name.rpartition(".")
    owner = getattr(settings, group) if group else settings
    return getattr(owner, "lambda_" if field == "lambda" else field)


def test_every_command_is_listed() -> None:
    commands = [command.callback.__name__ for command in app.registered_commands if command.callback]
    assert [name for name in commands if f"| `uniroute {name}" not in README] == []
    for group in app.registered_groups:
        assert isinstance(group.typer_instance, typer.Typer)
        (row,) = [line for line in README.splitlines() if line.startswith(f"| `uniroute {group.name} ")]
        names = [
            c.name or (c.callback.__name__ if c.callback else "") for c in group.typer_instance.registered_commands
        ]
        assert [name for name in names if name not in row] == []


def test_the_configuration_that_is_shown_loads(tmp_path: Path) -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "config.yaml").write_text(shown)
    assert isinstance(load_settings(tmp_path / "config.yaml", {}), Settings)


def test_every_json_that_is_shown_is_json() -> None:
    shown = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    assert [type(json.loads(text)) for text in shown] == [dict] * len(shown)


def test_the_documented_price_hash_and_channel_are_the_ones_in_use() -> None:
    assert f"HSET {price_key('small')} " in README
    assert f"PUBLISH {PRICING} small" in README
