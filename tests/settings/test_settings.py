from __future__ import annotations

import logging
import pickle
from contextlib import suppress
from pathlib import Path

import pytest

from proxy.server.startup import validate_files
from proxy.settings.model_config import SettingsError, check_model_name, resolve_secret
from proxy.settings.schema import Settings, _variable_paths, check_exposure, load_settings, setting_names
from proxy.storage.redis import Store

ONE_MODEL = """
model_list:
  - model_name: small
    litellm_params: {model: openai/small, api_base: "http://127.0.0.1:9001/v1", api_key: sk-canary}
    model_info: {input_cost_per_token: 1e-7, output_cost_per_token: 4.0e-7, max_input_tokens: 32000}
"""


def a_file(folder: Path, text: str) -> Path:
    path = folder / "uniroute.yaml"
    path.write_text(text, "utf-8")
    return path


def refusal(folder: Path, text: str, **environ: str) -> str:
    with pytest.raises(SettingsError) as refused:
        load_settings(a_file(folder, text), environ)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_defaults_are_the_documented_ones() -> None:
    settings = load_settings(None, {})
    assert (settings.lambda_, settings.route_names, settings.host, settings.port) == (0.1, ("auto",), "127.0.0.1", 8000)
    assert settings.profile.prompts == 60
    assert settings.data_dir == Path("~/.local/share/uniroute").expanduser()


def test_a_litellm_model_list_loads_and_yaml_numbers_without_a_dot_are_numbers(tmp_path: Path) -> None:
    (model,) = load_settings(a_file(tmp_path, ONE_MODEL), {}).model_list
    assert model.model_name == "small"
    assert model.model_info.input_cost_per_token == 1e-7
    assert model.model_info.supports_vision is None


def test_the_environment_overrules_the_file_and_the_command_line_overrules_both(tmp_path: Path) -> None:
    path = a_file(tmp_path, "uniroute: {lambda: 0.2, port: 1, profile: {prompts: 40, max_usd: 2}}")
    environ = {"UNIROUTE_LAMBDA": "0.3", "UNIROUTE_PORT": "2", "UNIROUTE_PROFILE_PROMPTS": "50"}
    settings = load_settings(path, environ, {"port": 3, "host": None})
    assert (settings.lambda_, settings.port, settings.host) == (0.3, 3, "127.0.0.1")
    assert (settings.profile.prompts, settings.profile.max_usd) == (50, 2)


def test_lists_in_a_variable_are_comma_separated_or_json() -> None:
    assert load_settings(None, {"UNIROUTE_ROUTE_NAMES": "auto, gpt-4o"}).route_names == ("auto", "gpt-4o")
    assert load_settings(None, {"UNIROUTE_ROUTE_NAMES": '["*"]'}).route_names == ("*",)


def test_every_setting_but_the_models_can_be_given_as_a_variable() -> None:
    samples = {
        "cost_unit": "cents",
        "feedback": "adapt",
        "housekeeping": "off",
        "trajectory": "off",
        "feedback_half_life_s": "3600",
        "presets": None,
        "limits_without_store": "allow",
        "log_format": "json",
        "allowed_env": "TOKEN",
        "allowed_origins": "https://app.example",
        "price_url": "https://prices.example/map.json",
        "recipe": "raw",
        "sticky_sessions": "on",
        "redis_url": "redis://127.0.0.1",
        "admin_key": "long-enough",
        "profile": None,
        "breaker": None,
        "reference_price": None,
        "data_dir": "/tmp/x",
        "workers": "2",
        "fallback_attempts": "2",
        "port": "2",
    }
    for name in setting_names():
        value = samples.get(name, "1")
        if name != "model_list" and value is not None:
            load_settings(None, {f"UNIROUTE_{name.upper()}": value})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("uniroute: {lamda: 1}", ["'lamda'", "did you mean 'lambda'"]),
        ("uniroute: {profile: {promts: 30}}", ["'promts'", "did you mean 'prompts'"]),
        ("modellist: []", ["'modellist'", "did you mean 'model_list'"]),
        ("model_list: [{model_name: a, litellm_parms: {}}]", ["model_list[0]", "did you mean 'litellm_params'"]),
        (
            "model_list: [{model_name: a, litellm_params: {model: x}, model_info: {supports_visoin: true}}]",
            ["did you mean 'supports_vision'"],
        ),
        ("model_list: [{model_name: a b, litellm_params: {model: x}}]", ["model_list[0].model_name", "'a b'"]),
        ("model_list: [{model_name: auto, litellm_params: {model: x}}]", ["'auto'", "routing"]),
        ("model_list: [{model_name: a, litellm_params: {}}]", ["litellm_params needs `model`"]),
        (
            "model_list: [{model_name: a, litellm_params: {model: x}, model_info: {input_cost_per_token: .nan}}]",
            ["model_info.input_cost_per_token", "finite"],
        ),
        (
            "model_list: [{model_name: a, litellm_params: {model: x}, model_info: {input_cost_per_token: 1.0e-7}}]",
            ["output_cost_per_token", "missing"],
        ),
        ("uniroute: {lambda: -1}", ["lambda", "-1"]),
        ("uniroute: {map: a, map: b}", ["'map' twice"]),
        ("uniroute: {lambda: yes}", ["lambda: must be a number; got true"]),
        ("uniroute: {profile: {prompts: true}}", ["profile.prompts: must be a number"]),
        ("uniroute: {profile: 60}", ["profile: must be a mapping", "60"]),
        ("uniroute: {route_names: 5}", ["route_names: must be a list; got 5"]),
        (
            "uniroute: {reference_price: {input_cost_per_token: 1, output_cost_per_tokn: 1}}",
            ["'output_cost_per_token'"],
        ),
        ("uniroute: {redis_url: 'localhost:6379'}", ["redis_url: must start with redis://"]),
        ("uniroute:\n  lambda: [\n", ["not valid YAML: line 3, column 1"]),
        ("model_list: [{litellm_params: {model: x}}]", ["model_list[0].model_name: is missing"]),
        (
            "model_list: [{model_name: a, litellm_params: {model: x, api_key: os.environ/UNIROUTE_ADMIN_KEY}}]",
            ["model_list[0].litellm_params.api_key", "'UNIROUTE_ADMIN_KEY'"],
        ),
        ("uniroute: [", ["not valid YAML"]),
        ("- 1", ["must be a mapping"]),
    ],
)
def test_a_wrong_file_is_refused_with_the_key_and_the_fix(tmp_path: Path, text: str, words: list[str]) -> None:
    message = refusal(tmp_path, text)
    assert "uniroute.yaml" in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    ("variables", "text", "begins"),
    [
        ({"ADMIN_KEY": "short"}, "", "UNIROUTE_ADMIN_KEY: is too short"),
        ({"LAMBDA": "-1"}, "uniroute: {lambda: 1}", "UNIROUTE_LAMBDA: must be a finite number"),
        ({"PROFILE_PROMPTS": "0"}, "uniroute: {profile: {max_usd: 1}}", "UNIROUTE_PROFILE_PROMPTS: "),
        ({"DEFAULT_MODEL": "auto"}, "", "UNIROUTE_DEFAULT_MODEL: 'auto' asks for routing"),
        (
            {"ROUTE_NAMES": "a"},
            "model_list: [{model_name: a, litellm_params: {model: x}}]",
            "UNIROUTE_ROUTE_NAMES: 'a'",
        ),
        ({"REDIS_URL": "redis://h", "REDIS_CA_FILE": "/x"}, "", "UNIROUTE_REDIS_URL: redis_ca_file is for TLS"),
        ({"BREAKER_LONGEST_COOLDOWN_S": "1"}, "", "UNIROUTE_BREAKER_LONGEST_COOLDOWN_S: must be at least"),
        (
            {"REFERENCE_PRICE_INPUT_COST_PER_TOKEN": "1"},
            "",
            "UNIROUTE_REFERENCE_PRICE_OUTPUT_COST_PER_TOKEN: is missing",
        ),
    ],
)
def test_a_bad_value_of_the_environment_is_reported_by_its_variable(
    tmp_path: Path, variables: dict[str, str], text: str, begins: str
) -> None:
    environ = {f"UNIROUTE_{name}": value for name, value in variables.items()}
    assert refusal(tmp_path, text, **environ).startswith(begins)


def test_a_variable_that_contradicts_the_file_is_named_beside_the_file(tmp_path: Path) -> None:
    message = refusal(tmp_path, "uniroute: {breaker: {longest_cooldown_s: 20}}", UNIROUTE_BREAKER_COOLDOWN_S="30")
    assert "uniroute.yaml: breaker.longest_cooldown_s: must be at least" in message
    assert "cooldown_s is set by UNIROUTE_BREAKER_COOLDOWN_S" in message


def test_a_bad_value_of_the_command_line_is_reported_by_its_option() -> None:
    with pytest.raises(SettingsError, match=r"^--port: "):
        load_settings(None, {}, {"port": 70_000})


def test_no_timeout_and_no_interval_is_too_short_to_work(tmp_path: Path) -> None:
    variables = [f"UNIROUTE_{name}" for name in _variable_paths() if name.endswith(("_S", "_MINUTES"))]
    assert len(variables) > 15
    allowed = []
    for variable in variables:
        with suppress(SettingsError):
            load_settings(None, {variable: "5e-324"})
            allowed.append(variable)
    assert allowed == ["UNIROUTE_PROMPT_CACHE_S", "UNIROUTE_QUEUE_WAIT_S"]  # as 0: none
    model = "{model_name: a, litellm_params: {model: x}, model_info: {idle_timeout_s: 5.0e-324}}"
    assert "model_info.idle_timeout_s: input should be greater than or equal to 0.01" in refusal(
        tmp_path, f"model_list: [{model}]"
    )


def _default(path: tuple[str, ...]) -> object:
    value: object = Settings()
    for name in path:
        value = getattr(value, "lambda_" if name == "lambda" else name)
    return value


def test_no_number_is_too_large_to_work_with() -> None:
    """Redis takes no time to live of any length, a timer no time of any length, and an infinite cost is none."""
    numbers = [
        f"UNIROUTE_{name}" for name, path in _variable_paths().items() if isinstance(_default(path), int | float)
    ]
    assert len(numbers) > 40
    allowed = []
    for variable in numbers:
        for value in ("1e300", f"1{'0' * 30}"):
            with suppress(SettingsError):
                load_settings(None, {variable: value})
                allowed.append(variable)
    assert allowed == []


def test_a_setting_of_a_variable_that_fails_at_the_start_is_reported_by_it(tmp_path: Path) -> None:
    environ = {"UNIROUTE_MAP": "/nowhere", "UNIROUTE_DATA_DIR": str(tmp_path)}
    with pytest.raises(SettingsError, match=r"^UNIROUTE_MAP: "):
        validate_files(load_settings(a_file(tmp_path, "uniroute: {map: builtin}"), environ))
    with pytest.raises(SettingsError, match=r"uniroute\.yaml: map: "):
        validate_files(load_settings(a_file(tmp_path, f"uniroute: {{map: /nowhere, data_dir: {tmp_path}}}"), {}))


async def test_a_redis_of_a_variable_that_cannot_be_used_is_reported_by_it() -> None:
    environ = {"UNIROUTE_REDIS_URL": "rediss://127.0.0.1:1", "UNIROUTE_REDIS_CA_FILE": "/nowhere/ca.pem"}
    with pytest.raises(SettingsError, match=r"^UNIROUTE_REDIS_CA_FILE: "):
        await Store.open(load_settings(None, environ))


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ("api_bse: http://h/v1", ["litellm_params.api_bse", "did you mean 'api_base'", "extra_body"]),
        ("apiBase: http://h/v1", ["'api_base'"]),
        ("api-key: os.environ/A_API_KEY", ["'api_key'"]),
        ("auth_token: os.environ/A_API_KEY", ["'api_key'"]),
        ("custom_llm_provder: openai", ["'custom_llm_provider'"]),
        ("temprature: 0", ["'temperature'"]),
        ("max_token: 5", ["'max_tokens'"]),
        ("aws_regoin_name: x", ["'aws_region_name'"]),
        ("sl_verify: false", ["'ssl_verify'"]),
        ("mock_response: hi", ["litellm_params.mock_response has no meaning here"]),
        ("extra_body: {a: [{b: os.environ/A_API_KEY}]}", ["litellm_params.extra_body.a[0].b", "extra_headers"]),
        ("user: os.environ/A_API_KEY", ["litellm_params.user"]),
        ("extra_headers: {x: os.environ/HOME}", ["litellm_params.extra_headers.x", "'HOME'"]),
        ("api_base: http://a/v1, base_url: http://b/v1", ["litellm_params.base_url", "differ"]),
        ("ssl_verify: 3", ["litellm_params.ssl_verify must be true, false or the path"]),
    ],
)
def test_a_parameter_that_would_have_no_effect_is_refused(tmp_path: Path, params: str, words: list[str]) -> None:
    message = refusal(tmp_path, f"model_list: [{{model_name: a, litellm_params: {{model: openai/x, {params}}}}}]")
    assert [word for word in ["model_list[0]", *words] if word not in message] == []


def test_fields_of_a_models_own_server_pass_and_an_unknown_one_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = "top_k: 3, min_p: 0.1, repetition_penalty: 1.1, reasoning_format: none, num_ctx: 1, aws_new_thing: 1"
    params = f"model: openai/x, {known}, zork: 2, extra_body: {{api_bse: 1}}"
    (model,) = load_settings(
        a_file(tmp_path, f"model_list: [{{model_name: a, litellm_params: {{{params}}}}}]"), {}
    ).model_list
    assert (model.litellm_params["top_k"], model.litellm_params["zork"]) == (3, 2)
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == [
        "'zork' is not known here; it is sent in the body of every request"
    ]


@pytest.mark.parametrize(
    ("section", "word"),
    [
        ("default_model: auto", "asks for routing"),
        ("default_model: gpt-4o, route_names: [gpt-4o]", "asks for routing"),
        ("allowed_env: [os.environ/TOKEN]", "'os.environ/TOKEN'"),
        ("allowed_env: [UNIROUTE_ADMIN_KEY]", "'UNIROUTE_ADMIN_KEY'"),
        ("allowed_hosts: ['https://proxy.example']", "'https://proxy.example'"),
        ("allowed_hosts: ['*']", "'*'"),
        ("allowed_origins: ['https://app.example/']", "'https://app.example/'"),
        ("allowed_origins: ['app.example']", "'app.example'"),
        ("allowed_origins: ['*']", "'*'"),
        ("price_url: prices.example/map.json", "http://"),
    ],
)
def test_a_setting_that_could_never_match_is_refused(tmp_path: Path, section: str, word: str) -> None:
    assert word in refusal(tmp_path, f"uniroute: {{{section}}}")


def test_a_queue_without_a_cap_is_refused(tmp_path: Path) -> None:
    model = "{model_name: a, litellm_params: {model: x}, model_info: {max_queued_requests: 3}}"
    assert "max_parallel_requests" in refusal(tmp_path, f"model_list: [{model}]")


def test_one_name_for_two_deployments_is_refused(tmp_path: Path) -> None:
    entry = "{model_name: a, litellm_params: {model: x}}"
    assert "given twice" in refusal(tmp_path, f"model_list: [{entry}, {entry}]")


def test_a_misspelt_variable_is_refused_and_a_foreign_one_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SettingsError, match="did you mean UNIROUTE_LAMBDA"):
        load_settings(None, {"UNIROUTE_LAMBA": "1"})
    load_settings(None, {"UNIROUTE_IMAGE_TAG": "1"})
    assert "UNIROUTE_IMAGE_TAG is not a setting" in caplog.text


def test_variables_that_kubernetes_sets_for_a_service_named_uniroute_are_no_settings() -> None:
    environ = {
        "UNIROUTE_PORT": "tcp://10.0.0.7:8000",
        "UNIROUTE_SERVICE_HOST": "10.0.0.7",
        "UNIROUTE_PORT_8000_TCP": "x",
    }
    assert load_settings(None, environ).port == 8000


def test_litellm_keys_without_meaning_here_are_dropped_with_a_warning_that_names_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = """
    litellm_settings: {drop_params: true}
    model_list:
      - model_name: a
        litellm_params: {model: x, rpm: 5, input_cost_per_token: 1.0e-6, output_cost_per_token: 2.0e-6}
        model_info: {team_id: t1}
    """
    with caplog.at_level(logging.WARNING):
        (model,) = load_settings(a_file(tmp_path, text), {}).model_list
    assert all(f"{key!r} is LiteLLM's" in caplog.text for key in ("litellm_settings", "rpm", "team_id"))
    assert model.litellm_params == {"model": "x"}
    assert model.model_info.output_cost_per_token == 2e-6


def test_no_repr_shows_a_secret(tmp_path: Path) -> None:
    environ = {"UNIROUTE_ADMIN_KEY": "canary-admin", "UNIROUTE_REDIS_URL": "redis://:canary@localhost"}
    settings = load_settings(a_file(tmp_path, ONE_MODEL), environ)
    assert "canary" not in f"{settings!r} {settings} {settings.model_list[0]!r}"
    with pytest.raises(SettingsError) as refused:
        load_settings(None, {"UNIROUTE_ADMIN_KEY": "canary"})
    assert "canary" not in str(refused.value)


def test_settings_reach_another_process_whole(tmp_path: Path) -> None:
    settings = load_settings(a_file(tmp_path, ONE_MODEL), {"UNIROUTE_ADMIN_KEY": "canary-admin"})
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_only_provider_keys_may_be_referred_to() -> None:
    environ = {"A_API_KEY": "k1", "AWS_SECRET": "k2", "UNIROUTE_ADMIN_KEY": "k3", "UNIROUTE_X_API_KEY": "k4"}
    assert resolve_secret("literal", environ) == "literal"
    assert resolve_secret("os.environ/A_API_KEY", environ) == "k1"
    assert resolve_secret("os.environ/AWS_SECRET", environ, ["AWS_SECRET"]) == "k2"
    for name in ("AWS_SECRET", "UNIROUTE_ADMIN_KEY", "UNIROUTE_X_API_KEY", "B_API_KEY"):
        with pytest.raises(SettingsError, match=name):
            resolve_secret(f"os.environ/{name}", environ, ["UNIROUTE_ADMIN_KEY"])


@pytest.mark.parametrize("name", ["a", "openai/gpt-4.1@eu:1", "9" * 128])
def test_model_names_with_the_documented_characters_are_accepted(name: str) -> None:
    assert check_model_name(name) == name


@pytest.mark.parametrize("name", ["", "a/../b", "a/.", "-a", "a b", "a\n", "é", "a" * 129, "uniroute/best"])
def test_model_names_with_other_characters_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"model name|routing"):
        check_model_name(name)


def test_listening_beyond_this_machine_needs_a_client_key() -> None:
    check_exposure(Settings(host="::1"), keys_required=False)
    check_exposure(Settings(host="0.0.0.0"), keys_required=True)
    for host in ("0.0.0.0", "::", "10.1.2.3", "example.org"):
        with pytest.raises(SettingsError, match="uniroute keys create"):
            check_exposure(Settings(host=host), keys_required=False)


def test_a_redis_address_that_is_refused_does_not_show_its_password(tmp_path: Path) -> None:
    assert "canary" not in refusal(tmp_path, "uniroute: {redis_url: 'http://:canary@host'}")


def test_a_variable_that_allowed_env_lists_may_be_named_before_it_is_set(tmp_path: Path) -> None:
    model = "{model_name: a, litellm_params: {model: x, api_key: os.environ/TOKEN}}"
    text = f"model_list: [{model}]\nuniroute: {{allowed_env: [TOKEN]}}"
    assert load_settings(a_file(tmp_path, text), {}).allowed_env == ("TOKEN",)


def test_retry_settings_of_litellm_are_dropped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "model_list: [{model_name: a, litellm_params: {model: x, num_retries: 3, temperature: 0}}]"
    (model,) = load_settings(a_file(tmp_path, text), {}).model_list
    assert model.litellm_params == {"model": "x", "temperature": 0}
    assert "'num_retries'" in caplog.text


def test_every_price_of_a_model_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = """
    model_list:
      - model_name: a
        litellm_params: {model: x, output_cost_per_reasoning_token: 3.0e-6}
        model_info: {input_cost_per_token: 1.0e-6, output_cost_per_token: 2.0e-6,
          input_cost_per_token_above_200k_tokens: 4.0e-6, input_cost_per_audio_token: 5.0e-6}
      - model_name: b
        litellm_params: {model: x}
        model_info: {tiered_pricing: [
          {range: [32000, 128000], input_cost_per_token: 2.0e-6, output_cost_per_token: 5.0e-6},
          {range: [0, 32000], input_cost_per_token: 1.0e-6, output_cost_per_token: 4.0e-6}]}
    """
    with caplog.at_level(logging.WARNING):
        first, second = load_settings(a_file(tmp_path, text), {}).model_list
    assert "ignored" not in caplog.text
    assert first.model_info.prices == {
        "input_cost_per_token": 1e-6,
        "output_cost_per_token": 2e-6,
        "input_cost_per_audio_token": 5e-6,
        "output_cost_per_reasoning_token": 3e-6,
        "input_cost_per_token_above_200k_tokens": 4e-6,
    }
    assert second.model_info.prices == {
        "input_cost_per_token": 1e-6,
        "output_cost_per_token": 4e-6,
        "input_cost_per_token_above_32k_tokens": 2e-6,
        "output_cost_per_token_above_32k_tokens": 5e-6,
    }


@pytest.mark.parametrize(
    ("price", "words"),
    [
        ("input_cost_per_token_above_200k_tokens: -1", "input_cost_per_token_above_200k_tokens"),
        ("input_cost_per_token_above_200k_tokens: yes", "input_cost_per_token_above_200k_tokens"),
        ("input_cost_per_token_above_200k_token: 1", "did you mean"),
        ("input_cost_per_token_above_2k_tokens: 1, input_cost_per_token_above_2000_tokens: 1", "stated twice"),
        ("free: true, output_cost_per_audio_token: 1", "contradict"),
    ],
)
def test_a_price_that_cannot_be_used_is_refused(tmp_path: Path, price: str, words: str) -> None:
    text = f"model_list: [{{model_name: a, litellm_params: {{model: x}}, model_info: {{{price}}}}}]"
    assert words in refusal(tmp_path, text)
