from __future__ import annotations

import logging
from pathlib import Path

import pytest

from proxy.errors import BadRequest
from proxy.server.admin_bodies import NewModel
from proxy.server.strict_bodies import parse_body
from proxy.settings.model_config import ModelInfo, SettingsError
from proxy.settings.schema import CircuitBreakerSettings, Settings, load_settings


def a_file(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def info_of(folder: Path, params: str, info: str = "{}") -> ModelInfo:
    text = f"model_list: [{{model_name: a, litellm_params: {{model: x, {params}}}, model_info: {info}}}]"
    (model,) = load_settings(a_file(folder, text), {}).model_list
    assert model.litellm_params == {"model": "x"}
    return model.model_info


def test_the_policy_is_a_mapping_of_the_file_and_each_part_a_variable(tmp_path: Path) -> None:
    path = a_file(tmp_path, "uniroute: {breaker: {failures: 3, window_s: 60}}")
    settings = load_settings(path, {"UNIROUTE_BREAKER_SHARE": "0.9", "UNIROUTE_BREAKER_FAILURES": "4"})
    assert settings.breaker == CircuitBreakerSettings(failures=4, window_s=60, share=0.9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{cooldown_s: 400}", ["breaker", "longest_cooldown_s", "at least cooldown_s, 400; got 300"]),
        ("{cooldown: 4}", ["breaker", "'cooldown'", "did you mean"]),
        ("{failures: 0}", ["breaker.failures"]),
        ("{share: 0}", ["breaker.share"]),
        ("{share: 1.5}", ["breaker.share"]),
        ("{window_s: .nan}", ["breaker.window_s"]),
        ("{longest_cooldown_s: .inf}", ["breaker.longest_cooldown_s"]),
    ],
)
def test_a_policy_that_cannot_work_is_refused_with_its_field(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(a_file(tmp_path, f"uniroute: {{breaker: {text}}}"), {})
    assert [word for word in words if word not in str(caught.value)] == []


def test_litellms_own_cap_is_read_where_litellm_has_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert info_of(tmp_path, "max_parallel_requests: 4").max_parallel_requests == 4
    assert caplog.text == ""


def test_a_cap_in_model_info_wins_over_litellms(tmp_path: Path) -> None:
    info = info_of(tmp_path, "max_parallel_requests: 4", "{max_parallel_requests: 2, max_queued_requests: 0}")
    assert (info.max_parallel_requests, info.max_queued_requests) == (2, 0)


@pytest.mark.parametrize("cap", ["0", "-1", "1.5", "yes"])
def test_a_cap_that_lets_nobody_in_is_refused(tmp_path: Path, cap: str) -> None:
    with pytest.raises(SettingsError, match="max_parallel_requests"):
        info_of(tmp_path, f"max_parallel_requests: {cap}")


def test_an_administrator_is_told_where_a_cap_belongs() -> None:
    body = {"model_name": "a", "litellm_params": {"model": "x", "max_parallel_requests": 4}}
    with pytest.raises(BadRequest, match="state it in `model_info`"):
        parse_body(NewModel, body).to_record(Settings(), {}, 0.0)
