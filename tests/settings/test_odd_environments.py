from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.support.command import ADMIN_KEY, ServeCommand, environment, run_command
from tests.support.scripted_upstream import ScriptedUpstream

ODD = {
    "NO_PROXY": "[::1",
    "no_proxy": "localhost,127.0.0.1,[::1]:8000,::1/128,fd00::/8,10.0.0.0/99",
    "HTTP_PROXY": ":::",
    "ALL_PROXY": "socks5h://127.0.0.1:9",
    "SSL_CERT_FILE": "/nowhere.pem",
}


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path
) -> Iterator[tuple[ServeCommand, dict[str, str]]]:
    """Serve a model on loopback, and one on a host that does not exist."""
    folder = tmp_path_factory.mktemp("odd")
    kept = {"UNIROUTE_ADMIN_KEY": ADMIN_KEY, "MODEL_API_KEY": "sk-of-the-arm"}
    environ = environment(folder / "data", embedder_cache, **kept, **ODD)
    with ScriptedUpstream(lambda _: "42") as near:
        bases = {"near": near.url, "far": "http://far.invalid/v1"}
        models = [
            {
                "model_name": name,
                "litellm_params": {"model": f"openai/{name}", "api_base": base, "api_key": "os.environ/MODEL_API_KEY"},
                "model_info": {"free": True},
            }
            for name, base in bases.items()
        ]
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump({"model_list": models, "uniroute": {"profile": {"on_start": False}}}))
        with ServeCommand("--config", config, environ=environ, log=folder / "log.txt") as server:
            yield server, {**environ, "UNIROUTE_URL": server.url}


@pytest.mark.parametrize(("model", "status"), [("near", 200), ("far", 502)])
def test_the_server_starts_and_only_the_models_that_need_the_proxy_fail(
    served: tuple[ServeCommand, dict[str, str]], model: str, status: int
) -> None:
    server, _ = served
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60, trust_env=False)
    assert reply.status_code == status, reply.text
    assert ("_PROXY" in reply.text.upper()) == (status != 200)
    assert "Traceback" not in server.log


def test_each_unusable_variable_is_one_line_of_the_log(served: tuple[ServeCommand, dict[str, str]]) -> None:
    server, _ = served
    lines = [line for line in server.log.splitlines() if "environment: " in line]
    wanted = ("HTTP_PROXY", "ALL_PROXY", "SSL_CERT_FILE", "'10.0.0.0/99'")
    assert [sum(name in line for line in lines) for name in wanted] == [1] * len(wanted)


@pytest.mark.parametrize(
    "arguments",
    [
        ["models", "list", "--json"],
        ["route", "hello", "--json", "--model", "uniroute/cheap"],
        ["keys", "list", "--json"],
        ["prices", "sync", "--json"],
    ],
)
def test_commands_work_in_such_an_environment(
    served: tuple[ServeCommand, dict[str, str]], arguments: list[str]
) -> None:
    _, environ = served
    ended = run_command(*arguments, environ=environ)
    assert "Traceback" not in ended.stderr
    if arguments[0] == "route":  # nothing is measured yet
        assert "503" in ended.stderr, ended.stderr
    else:
        assert isinstance(json.loads(ended.stdout), list | dict), ended.stderr


def test_a_command_that_needs_the_proxy_says_so_in_one_line(tmp_path: Path) -> None:
    environ = environment(tmp_path, ALL_PROXY="socks5://127.0.0.1:9", NO_PROXY="[::1]", UNIROUTE_ADMIN_KEY=ADMIN_KEY)
    for arguments in (["models", "list", "--url", "http://far.invalid"], ["prices", "sync", "http://far.invalid/p"]):
        ended = run_command(*arguments, environ=environ)
        assert ended.returncode == 1
        assert "ALL_PROXY names a SOCKS proxy" in ended.stderr.splitlines()[-1]
        assert "Traceback" not in ended.stderr
