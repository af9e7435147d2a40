from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import pytest

from proxy.server.startup import check_named_models, validate_files
from proxy.settings.model_config import SettingsError
from proxy.settings.schema import Settings, load_settings
from router_core.estimators import ESTIMATORS
from tests.support.command import environment, run_command

BROKEN_SET = (
    '{"prompt": "2+2?", "grader": {"type": "numeric", "answer": 4}}\n{"prompt": "x", "grader": {"type": "numerc"}}\n'
)


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set where a data folder is made if no test names one."""
    monkeypatch.setenv("UNIROUTE_DATA_DIR", str(tmp_path / "data"))


def settings_of(**section: object) -> Settings:
    return Settings.model_validate({"data_dir": Path(os.environ["UNIROUTE_DATA_DIR"]), **section})


def test_the_builtin_map_and_validation_set_are_valid() -> None:
    validate_files(settings_of())


def test_a_missing_map_is_refused_by_the_name_of_its_setting() -> None:
    with pytest.raises(SettingsError, match=r"^map: .*uniroute fit"):
        validate_files(settings_of(map="/nowhere/map"))


def test_a_broken_line_of_a_validation_set_is_refused_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text(BROKEN_SET)
    with pytest.raises(SettingsError, match=r"^validation_set: .*line 2.*'numeric'"):
        validate_files(settings_of(validation_set=str(tmp_path / "set.jsonl")))


def test_a_missing_validation_set_is_refused_by_the_name_of_its_setting(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^validation_set: .*none\.jsonl"):
        validate_files(settings_of(validation_set=str(tmp_path / "none.jsonl")))


def test_a_broken_or_missing_ca_file_is_refused_by_the_name_of_its_setting(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    for path in (tmp_path / "ca.pem", tmp_path / "none.pem"):
        model = {"model_name": "a", "litellm_params": {"model": "openai/x", "ssl_verify": str(path)}}
        with pytest.raises(SettingsError, match=r"^model_list\[0\]\.litellm_params\.ssl_verify: .*PEM"):
            validate_files(settings_of(model_list=[model]))


@pytest.mark.parametrize(
    ("names", "model", "problem"),
    [
        (
            ["a"],
            "openai/gpt-4o-mini",
            r"^model_list\[0\]\.model_info\.effort: .* is not known to reason",
        ),
        (["a", "a@low"], "openai/o3", r"^model_list\[0\]\.model_info\.effort: 'a@low' is also a model"),
    ],
)
def test_efforts_that_a_model_cannot_have_are_refused(names: list[str], model: str, problem: str) -> None:
    models: list[dict[str, Any]] = [{"model_name": name, "litellm_params": {"model": model}} for name in names]
    models[0]["model_info"] = {"effort": "auto"}
    with pytest.raises(SettingsError, match=problem):
        validate_files(settings_of(model_list=models))


def named(*served: str, complete: bool = True, **section: object) -> None:
    check_named_models(settings_of(**section), served, {"gpt-4o"}.__contains__, complete=complete)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"default_model": "smal"}, "no model is named 'smal'; did you mean 'small'"),
        ({"default_model": "smal", "admin_key": "long-enough"}, "did you mean 'small'"),
        ({"default_model": "other"}, "known models: small"),
        ({"judge_model": "smal"}, "judge_model: 'smal' is no registered model"),
    ],
)
def test_an_unknown_model_that_can_never_be_added_is_refused(section: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        named("small", **section)


def test_an_unknown_model_that_can_still_be_added_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    named("small", default_model="small", judge_model="gpt-4o")
    named("small", judge_model="openai/new")
    assert caplog.text == ""
    named("small", default_model="other", admin_key="long-enough")
    named("small", default_model="smal", judge_model="nobody", complete=False)
    assert caplog.text.count("nothing stands in") == 2


def test_every_recipe_can_be_set_and_no_other() -> None:
    assert set(get_args(Settings.model_fields["recipe"].annotation)) == set(ESTIMATORS)
    with pytest.raises(SettingsError, match="UNIROUTE_RECIPE"):
        load_settings(None, {"UNIROUTE_RECIPE": "foo"})


def test_serve_refuses_in_one_line_and_leaves_no_process_behind(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("uniroute:\n  map: nowhere\n")
    ended = run_command("serve", "--config", config, "--port", "0", environ=environment(tmp_path / "data"))
    assert ended.returncode == 2
    assert ended.stderr.strip().startswith(f"uniroute: {config}: map: ")
    assert ended.stderr.count("\n") == 1
    assert list((tmp_path / "data").iterdir()) == []
