from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from proxy.cli import app
from proxy.cli.launch_clients import CLIENTS, KEY_VARIABLE, NO_KEY, Target, setup_for
from tests.support.command import ADMIN_KEY, ServeCommand, environment, run_command
from tests.support.processes import process_group, store_answers
from tests.support.proxy_process import uniform_profile
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until

SECRET = "sk-uniroute-canary"
WINDOW = 50_000

# A client that writes down what it was given, and then behaves as CLIENT_DOES says.
STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time, urllib.request
settings = os.environ.get("AIDER_MODEL_SETTINGS_FILE", "")
folder = pathlib.Path(os.environ.get("LLM_USER_PATH") or os.path.dirname(settings))
files = {{p.name: p.read_text() for p in folder.iterdir()}} if str(folder) != "." else {{}}
seen = {{"environment": dict(os.environ), "arguments": sys.argv[1:], "files": files, "folder": str(folder)}}
does = os.environ.get("CLIENT_DOES", "")
if does == "ask":
    body = json.dumps({{"model": "auto", "messages": [{{"role": "user", "content": "hi"}}]}}).encode()
    url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
    request = urllib.request.Request(url, body, {{"content-type": "application/json"}})
    seen["answer"] = json.load(urllib.request.urlopen(request))
if does == "outlive":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(5))
report = pathlib.Path(os.environ["REPORT"])
report.with_suffix(".new").write_text(json.dumps(seen))
report.with_suffix(".new").rename(report)
if does == "die":
    os.kill(os.getpid(), signal.SIGKILL)
while does == "outlive" or does == "wait":
    time.sleep(0.05)
sys.exit(3)
"""


@pytest.fixture(scope="module")
def upstream() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream(lambda _: "42") as started:
        yield started


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path, upstream: ScriptedUpstream) -> Iterator[str]:
    """A server with one measured model."""
    folder = tmp_path_factory.mktemp("served")
    environ = environment(folder / "data", embedder_cache, UNIROUTE_ADMIN_KEY=ADMIN_KEY)
    (folder / "profile.json").write_text(json.dumps(uniform_profile(0.25)))
    with ServeCommand(environ=environ, log=folder / "log.txt") as server:
        add = ("models", "add", "small", "--model", "openai/small", "--api-base", upstream.url, "--free")
        added = run_command(*add, "--profile", folder / "profile.json", environ={**environ, "UNIROUTE_URL": server.url})
        assert added.returncode == 0, added.stderr
        yield server.url


@pytest.fixture
def client_environ(environ: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has every client; what a client was given is in the file REPORT."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in (*(client.program for client in CLIENTS if client.program), "other"):
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    (tmp_path / "tmp").mkdir()
    path = f"{programs}:{environ['PATH']}"
    return {**environ, "PATH": path, "REPORT": str(tmp_path / "report.json"), "TMPDIR": str(tmp_path / "tmp")}


def report(environ: Mapping[str, str]) -> dict[str, Any]:
    seen: dict[str, Any] = json.loads(Path(environ["REPORT"]).read_text())
    return seen


def left_behind(environ: Mapping[str, str]) -> list[Path]:
    return list(Path(environ["TMPDIR"]).iterdir())


def words_of(name: str) -> list[str]:
    """The arguments of the client: of `env`, the program comes first."""
    return ["other"] if name == "env" else []


def printed(*arguments: str, environ: Mapping[str, str]) -> str:
    """Return what a command that starts nothing writes, run in this process."""
    ended = CliRunner().invoke(app, ["launch", *arguments], env=environ)
    assert ended.exit_code == 0, ended.output
    return ended.output


each_client = pytest.mark.parametrize("name", [client.name for client in CLIENTS])


@each_client
def test_a_client_runs_with_its_variables_files_and_arguments(
    name: str, served: str, client_environ: dict[str, str]
) -> None:
    words = [*words_of(name), "--first", "a b"]
    ended = run_command("launch", name, "--url", served, "--", *words, environ=client_environ)
    assert (ended.returncode, ended.stdout) == (3, ""), ended.stderr
    seen = report(client_environ)
    setup = setup_for(
        next(client for client in CLIENTS if client.name == name),
        Target(served, "auto", NO_KEY, seen["folder"]),
        client_environ,
    )
    assert seen["environment"].items() >= setup.environment.items()
    assert seen["arguments"] == [*setup.arguments, "--first", "a b"]
    assert seen["files"] == setup.files
    assert left_behind(client_environ) == []


@each_client
def test_what_would_be_set_is_shown_without_client_or_server(
    name: str, environ: dict[str, str], tmp_path: Path
) -> None:
    bare = {**environ, "PATH": "/nonexistent", "UNIROUTE_PORT": "1", "TMPDIR": str(tmp_path)}
    shown = printed(name, "--print", environ=bare)
    document = json.loads(printed(name, "--json", environ=bare))
    assert [variable for variable in document["environment"] if f"export {variable}=" not in shown] == []
    assert "127.0.0.1:1" in shown


@each_client
def test_the_lines_that_are_shown_do_in_a_shell_what_launch_does(
    name: str, served: str, client_environ: dict[str, str]
) -> None:
    keyed = {**client_environ, KEY_VARIABLE: SECRET}
    arguments = (name, "--url", served, "--model", "small")
    shown = printed(*arguments, "--print", "--", *words_of(name), environ=keyed)
    script = f'{shown}\n{shown.splitlines()[-1].removeprefix("# ")}\nrm -r "${{UNIROUTE_FOLDER:-$TMPDIR/none}}"'
    subprocess.run(["bash", "-c", script], env=keyed, check=False, capture_output=True)
    by_hand = report(keyed)
    assert run_command("launch", *arguments, "--", *words_of(name), environ=keyed).returncode == 3
    by_launch = report(keyed)
    document = json.loads(printed(*arguments, "--json", environ=keyed))
    assert given(by_hand, document) == given(by_launch, document)
    assert [variable for variable in document["unset"] if variable in by_hand["environment"]] == []


def given(seen: Mapping[str, Any], document: Mapping[str, Any]) -> list[Any]:
    """Return what a client was given, without the folder, which is another each time."""
    environment = {v: seen["environment"][v].replace(seen["folder"], "folder") for v in document["environment"]}
    return [environment, seen["arguments"], seen["files"]]


@each_client
def test_a_key_reaches_the_client_and_is_shown_nowhere(name: str, served: str, client_environ: dict[str, str]) -> None:
    keyed = {**client_environ, KEY_VARIABLE: SECRET, "UNIROUTE_ADMIN_KEY": ADMIN_KEY}
    shown = printed(name, "--print", environ=keyed) + printed(name, "--json", "--key", SECRET, environ=keyed)
    ended = run_command("launch", name, "--url", served, "--", *words_of(name), environ=keyed)
    assert SECRET not in shown + ended.stdout + ended.stderr
    assert f"${KEY_VARIABLE}" in shown
    seen = report(keyed)
    assert SECRET in {value for variable, value in seen["environment"].items() if variable != "REPORT"}
    assert SECRET not in json.dumps([seen["arguments"], seen["files"]])
    assert "UNIROUTE_ADMIN_KEY" not in seen["environment"]


def test_the_users_own_keys_for_another_service_are_not_sent(served: str, client_environ: dict[str, str]) -> None:
    own = {**client_environ, "ANTHROPIC_API_KEY": "own", "CLAUDE_CODE_USE_BEDROCK": "1"}
    assert run_command("launch", "claude", "--url", served, environ=own).returncode == 3
    assert {"ANTHROPIC_API_KEY", "CLAUDE_CODE_USE_BEDROCK"}.isdisjoint(report(own)["environment"])


def test_a_model_by_name_is_used_for_everything(served: str, client_environ: dict[str, str]) -> None:
    ended = run_command("launch", "claude", "--url", served, "--model", "small", environ=client_environ)
    models = {v: name for v, name in report(client_environ)["environment"].items() if v.endswith("_MODEL")}
    assert (ended.returncode, len(models), set(models.values())) == (3, 5, {"small"})


def test_this_machine_is_reached_without_the_proxy_of_the_environment(
    served: str, client_environ: dict[str, str]
) -> None:
    proxied = {**client_environ, "HTTP_PROXY": "http://127.0.0.1:1", "NO_PROXY": "example.org", "no_proxy": ""}
    assert run_command("launch", "qwen", "--url", served, environ=proxied).returncode == 3
    seen = report(proxied)["environment"]
    assert seen["NO_PROXY"] == seen["no_proxy"] == "example.org,127.0.0.1,localhost,::1"


def test_a_server_elsewhere_keeps_the_proxy(environ: dict[str, str]) -> None:
    shown = printed("qwen", "--url", "https://router.example/v1/", "--print", environ=environ)
    assert "OPENAI_BASE_URL=https://router.example/v1\n" in shown
    assert "proxy" not in shown.lower()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["cluade"], 2, "did you mean 'claude'?"),
        (["photoshop"], 2, "known are claude, codex,"),
        (["env"], 2, "name the program"),
        (["claude", "--model", ""], 2, "--model"),
        (["claude", "--config", "/nowhere.yaml"], 2, "/nowhere.yaml"),
        (["claude", "--url", "nonsense"], 2, "--url"),
        (["claude", "--url", "http://127.0.0.1:1"], 1, "no UniRoute server answers at http://127.0.0.1:1"),
        (["env", "--", "no-such-program"], 1, "no-such-program is not installed"),
    ],
)
def test_what_cannot_be_launched_is_one_line(
    client_environ: dict[str, str], arguments: list[str], status: int, words: str
) -> None:
    ended = run_command("launch", *arguments, environ=client_environ)
    assert (ended.returncode, ended.stderr.count("\n")) == (status, 1), ended.stderr
    assert words in ended.stderr


@pytest.mark.parametrize("client", [client for client in CLIENTS if client.program], ids=lambda client: client.name)
def test_a_client_that_is_not_installed_is_named_with_its_installation(client: Any, environ: dict[str, str]) -> None:
    ended = run_command("launch", client.name, environ={**environ, "PATH": "/nonexistent"})
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert client.install in ended.stderr


def test_what_the_server_refuses_is_said_before_the_client_runs(served: str, client_environ: dict[str, str]) -> None:
    ended = run_command("launch", "claude", "--url", served, "--model", "smal", environ=client_environ)
    assert (ended.returncode, "'smal' does not exist" in ended.stderr) == (1, True)
    assert not Path(client_environ["REPORT"]).exists()


def test_a_server_that_asks_for_a_key_is_told_where_to_give_it(
    client_environ: dict[str, str], upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    made = run_command("keys", "create", "somebody", environ=client_environ)
    assert made.returncode == 0, made.stderr
    ended = run_command("launch", "claude", "--config", config_file(tmp_path, upstream), environ=client_environ)
    assert (ended.returncode, f"--key, or {KEY_VARIABLE}" in ended.stderr) == (1, True), ended.stderr


def test_another_server_at_the_address_is_not_taken_for_ours(
    client_environ: dict[str, str], upstream: ScriptedUpstream
) -> None:
    ended = run_command("launch", "claude", environ={**client_environ, "UNIROUTE_PORT": str(upstream.port)})
    assert (ended.returncode, "no UniRoute server" in ended.stderr) == (1, True)


def config_file(folder: Path, upstream: ScriptedUpstream, **more: Any) -> Path:
    model: dict[str, Any] = {
        "model_name": "small",
        "litellm_params": {"model": "openai/small", "api_base": upstream.url},
    }
    path = folder / "config.yaml"
    section = {"profile": {"prompts": 20}, "data_dir": str(folder / "data"), "port": 1, **more}
    model["model_info"] = {"free": True, "max_input_tokens": WINDOW}
    path.write_text(yaml.safe_dump({"model_list": [model], "uniroute": section}))
    return path


def test_without_a_server_one_is_started_and_stopped_again(
    client_environ: dict[str, str], upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    config = config_file(tmp_path, upstream)
    asking = {**client_environ, "CLIENT_DOES": "ask"}
    ended = run_command("launch", "env", "--config", config, "--", "other", environ=asking)
    assert ended.returncode == 3, ended.stderr
    assert report(asking)["answer"]["choices"][0]["message"]["content"] == "42"
    assert not store_answers(tmp_path / "data")
    assert left_behind(asking) == []


def test_a_client_is_told_the_context_window_that_the_server_knows(
    client_environ: dict[str, str], upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    ended = run_command("launch", "codex", "--config", config_file(tmp_path, upstream), environ=client_environ)
    assert ended.returncode == 3, ended.stderr
    assert f"model_context_window={WINDOW}" in report(client_environ)["arguments"]


@pytest.mark.parametrize("name", ["claude", "codex", "opencode", "aider"])
def test_clients_that_shorten_conversations_know_when(name: str) -> None:
    client = next(client for client in CLIENTS if client.name == name)
    unknown, known = (client.setup(Target("http://here", "auto", "key", "/tmp", window)) for window in (None, WINDOW))
    assert str(WINDOW) in repr(known)
    assert str(WINDOW) not in repr(unknown)


def test_a_server_that_does_not_start_is_said_with_its_log(client_environ: dict[str, str], tmp_path: Path) -> None:
    broken = {**client_environ, "UNIROUTE_PORT": "1", "UNIROUTE_MAP": str(tmp_path / "nowhere")}
    ended = run_command("launch", "claude", environ=broken)
    assert ended.returncode == 1
    assert "the server did not start: uniroute: UNIROUTE_MAP:" in ended.stderr
    assert str(tmp_path / "data" / "launch.log") in ended.stderr


def test_the_status_of_a_killed_client_is_that_of_a_shell(served: str, client_environ: dict[str, str]) -> None:
    dying = {**client_environ, "CLIENT_DOES": "die"}
    assert run_command("launch", "llm", "--url", served, environ=dying).returncode == 128 + signal.SIGKILL
    assert left_behind(dying) == []


def launched(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "proxy.cli", "launch", *map(str, arguments)]


def test_ctrl_c_is_the_clients_to_answer(served: str, client_environ: dict[str, str]) -> None:
    surviving = {**client_environ, "CLIENT_DOES": "outlive"}
    with process_group(launched("llm", "--url", served), surviving) as group:
        assert wait_until(Path(client_environ["REPORT"]).exists)
        group.interrupt()
        assert group.end() == ("", "", 5)
    assert left_behind(surviving) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_client_and_the_server_that_was_started_for_it(
    number: signal.Signals, client_environ: dict[str, str], upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    waiting = {**client_environ, "CLIENT_DOES": "wait"}
    with process_group(launched("llm", "--config", config_file(tmp_path, upstream)), waiting) as group:
        assert wait_until(Path(client_environ["REPORT"]).exists)
        os.kill(group.pid, number)
        assert group.end()[2] == 128 + number
    assert not store_answers(tmp_path / "data")
    assert left_behind(waiting) == []


def test_a_server_outlives_no_launch_that_was_killed(
    client_environ: dict[str, str], upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    waiting = {**client_environ, "CLIENT_DOES": "wait"}
    with process_group(launched("claude", "--config", config_file(tmp_path, upstream)), waiting) as group:
        assert wait_until(Path(client_environ["REPORT"]).exists)
        assert store_answers(tmp_path / "data")
        os.kill(group.pid, signal.SIGKILL)
        assert wait_until(lambda: not store_answers(tmp_path / "data"))


def test_a_folder_named_like_our_package_is_not_run(
    client_environ: dict[str, str], upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    (tmp_path / "here" / "proxy").mkdir(parents=True)
    (tmp_path / "here" / "proxy" / "__init__.py").write_text("raise SystemExit(9)")
    command = [sys.executable, "-P", "-m", "proxy.cli", "launch", "claude"]
    arguments = ["--config", str(config_file(tmp_path, upstream))]
    ended = subprocess.run([*command, *arguments], env=client_environ, cwd=tmp_path / "here", capture_output=True)
    assert ended.returncode == 3, ended.stderr
