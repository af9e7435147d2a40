from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from proxy.server.run import inherited_socket
from proxy.settings.model_config import SettingsError
from tests.support.command import ADMIN_KEY, ServeCommand, environment, run_command
from tests.support.processes import children_of, fork_servers, is_running, store_answers
from tests.support.proxy_process import uniform_profile
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def upstream() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream(lambda _: "42") as started:
        yield started


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path
) -> Iterator[tuple[ServeCommand, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("served")
    environ = environment(folder / "data", embedder_cache, UNIROUTE_ADMIN_KEY=ADMIN_KEY, TINY_API_KEY="canary")
    with ServeCommand(environ=environ, log=folder / "log.txt") as server:
        yield server, {**environ, "UNIROUTE_URL": server.url}


def config_file(folder: Path, upstream: ScriptedUpstream, **section: Any) -> Path:
    model = {"model_name": "small", "litellm_params": {"model": "openai/small", "api_base": upstream.url}}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"model_list": [{**model, "model_info": {"free": True}}], "uniroute": section}))
    return path


def add(name: str, upstream: ScriptedUpstream, environ: Mapping[str, str], *more: str | Path) -> Any:
    """Return the parsed stdout of `models add --json`."""
    arguments = ("models", "add", name, "--model", f"openai/{name}", "--api-base", upstream.url, "--json", *more)
    ended = run_command(*arguments, environ=environ)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_a_model_added_by_the_command_is_measured_listed_routed_and_removed(
    served: tuple[ServeCommand, dict[str, str]], upstream: ScriptedUpstream
) -> None:
    _, environ = served
    card = add("asked", upstream, environ, "--input-cost", "1.5", "--output-cost", "3", "--prompts", "20")
    assert card["state"] == "ready"
    assert sum(card["profile"]["labels"]) == pytest.approx(20, abs=0.01)
    row = next(
        line.split() for line in run_command("models", "list", environ=environ).stdout.splitlines() if "asked" in line
    )
    assert [row[0], row[1], *row[3:6]] == ["asked", "ready", "1.5", "3", "model_info"]
    decision = json.loads(run_command("route", "hello there", "--lambda", "0.2", "--json", environ=environ).stdout)
    assert "asked" in [candidate["model"] for candidate in decision["candidates"]]
    assert decision["lambda"] == 0.2
    assert run_command("models", "remove", "asked", environ=environ).returncode == 0
    assert "asked" not in run_command("models", "list", environ=environ).stdout


def test_efforts_are_added_measured_and_removed_with_their_model(
    served: tuple[ServeCommand, dict[str, str]], upstream: ScriptedUpstream
) -> None:
    _, environ = served
    arguments = ("--model", "openai/thinker", "--api-base", upstream.url, "--free", "--effort", "low,high")
    ended = run_command("models", "add", "thinker", *arguments, "--prompts", "24", environ=environ)
    assert ended.returncode == 0, ended.stderr
    assert [line.split(" is ready")[0] for line in ended.stdout.splitlines()] == ["thinker@low", "thinker@high"]
    listed = run_command("models", "list", environ=environ).stdout
    assert {"thinker", "thinker@low", "thinker@high"} <= set(listed.split())
    refused = run_command("models", "add", "odd", *arguments[:-1], "much", environ=environ)
    assert "an effort is one of none, minimal, low" in refused.stderr
    assert run_command("models", "remove", "thinker", environ=environ).returncode == 0
    assert "thinker" not in run_command("models", "list", environ=environ).stdout


def test_progress_goes_to_stderr_in_plain_lines_where_there_is_no_terminal(
    served: tuple[ServeCommand, dict[str, str]], upstream: ScriptedUpstream
) -> None:
    _, environ = served
    arguments = ("models", "add", "lines", "--model", "openai/lines", "--api-base", upstream.url, "--free")
    ended = run_command(*arguments, "--prompts", "20", environ=environ)
    assert "lines: 20/20" in ended.stderr
    assert "\x1b" not in ended.stderr + ended.stdout
    assert ended.stdout.startswith("lines is ready: mean error ")


def test_no_wait_names_the_job_and_claims_nothing_of_the_old_profile(
    served: tuple[ServeCommand, dict[str, str]], upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    _, environ = served
    (tmp_path / "profile.json").write_text(json.dumps(uniform_profile(0.25)))
    add("unhurried", upstream, environ, "--free", "--profile", tmp_path / "profile.json")
    ended = run_command("models", "profile", "unhurried", "--prompts", "20", "--no-wait", environ=environ)
    assert (ended.returncode, ended.stdout) == (0, "")
    assert "uniroute models show unhurried" in ended.stderr
    assert run_command("models", "profile", "unhurried", "--prompts", "20", environ=environ).returncode == 0


def test_a_ready_profile_is_taken_and_nothing_is_asked(
    served: tuple[ServeCommand, dict[str, str]], upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    _, environ = served
    (tmp_path / "profile.json").write_text(json.dumps(uniform_profile(0.25)))
    before = len(upstream.history)
    card = add("handed", upstream, environ, "--free", "--profile", tmp_path / "profile.json")
    assert (card["job"], card["state"]) == (None, "ready")
    assert card["profile"]["mean_error"] == pytest.approx(0.25, abs=0.01)
    assert len(upstream.history) == before


def test_outcomes_become_a_profile_that_knows_maths_from_poems(
    served: tuple[ServeCommand, dict[str, str]], upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    _, environ = served
    good = [{"id": f"g{n}", "prompt": f"What is {n} plus {n + 7}?", "scores": {"scored": 1.0}} for n in range(30)]
    bad = [{"id": f"b{n}", "prompt": f"Sing a sad song of river {n}", "scores": {"scored": 0.0}} for n in range(30)]
    (tmp_path / "outcomes.jsonl").write_text("\n".join(map(json.dumps, [*good, *bad])))
    add("scored", upstream, environ, "--free", "--outcomes", tmp_path / "outcomes.jsonl")
    errors = []
    for prompt in ("What is 12 plus 19?", "Sing a sad song of the sea"):
        decision = json.loads(run_command("route", prompt, "--json", environ=environ).stdout)
        errors += [c["expected_error"] for c in decision["candidates"] if c["model"] == "scored"]
    assert errors[0] < 0.3 < 0.7 < errors[1]
    unknown = run_command("models", "profile", "nobody", "--outcomes", tmp_path / "outcomes.jsonl", environ=environ)
    assert (unknown.returncode, "it has scored" in unknown.stderr) == (1, True)


def test_what_the_server_refuses_is_one_line_with_its_reason(
    served: tuple[ServeCommand, dict[str, str]], upstream: ScriptedUpstream
) -> None:
    _, environ = served
    wrong_key = run_command("models", "list", environ={**environ, "UNIROUTE_ADMIN_KEY": "another-key"})
    assert (wrong_key.returncode, "401" in wrong_key.stderr, wrong_key.stderr.count("\n")) == (1, True, 1)
    foreign = ("models", "add", "x", "--model", "openai/x", "--api-key-env", "AWS_SECRET", "--free")
    assert "AWS_SECRET" in run_command(*foreign, environ=environ).stderr
    both = ("models", "add", "x", "--model", "openai/x", "--free", "--input-cost", "1")
    assert run_command(*both, environ=environ).returncode == 2


def test_the_key_of_a_model_is_shown_nowhere(
    served: tuple[ServeCommand, dict[str, str]], upstream: ScriptedUpstream
) -> None:
    server, environ = served
    add("keyed", upstream, environ, "--free", "--api-key-env", "TINY_API_KEY", "--prompts", "20")
    assert upstream.last.headers["authorization"] == "Bearer canary"
    output = run_command("models", "show", "keyed", environ=environ).stdout
    assert "os.environ/TINY_API_KEY" in output
    assert "canary" not in output + server.log


def test_a_configured_model_is_measured_on_the_first_start_and_not_again(
    tmp_path: Path, upstream: ScriptedUpstream, embedder_cache: Path
) -> None:
    environ = environment(tmp_path / "data", embedder_cache, UNIROUTE_ADMIN_KEY=ADMIN_KEY)
    config = config_file(tmp_path, upstream, profile={"prompts": 20})
    with ServeCommand("--config", config, environ=environ, log=tmp_path / "one.txt") as server:
        listing = {**environ, "UNIROUTE_URL": server.url}
        ready = wait_until(lambda: "ready" in run_command("models", "list", environ=listing).stdout)
        assert ready, server.log
        assert server.stop() == 0
    requests = len(upstream.history)
    with ServeCommand("--config", config, environ=environ, log=tmp_path / "two.txt") as server:
        question = {"model": "auto", "messages": [{"role": "user", "content": "hi"}]}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=question, timeout=20)
    assert answer.json()["model"] == "small"
    assert len(upstream.history) == requests + 1


def test_workers_share_the_port_and_end_with_a_killed_parent(
    tmp_path: Path, upstream: ScriptedUpstream, embedder_cache: Path
) -> None:
    environ = environment(tmp_path / "data", embedder_cache, UNIROUTE_ADMIN_KEY=ADMIN_KEY)
    config = config_file(tmp_path, upstream, profile={"on_start": False})
    with ServeCommand("--config", config, "--workers", "2", environ=environ, log=tmp_path / "log.txt") as server:
        workers = children_of(server.pid)
        assert len(workers) == 2
        left = [*workers, *fork_servers(server.pid)]
        server.stop(signal.SIGKILL)
        assert wait_until(lambda: not any(is_running(pid) for pid in left))
    assert not store_answers(tmp_path / "data")


def test_sigterm_lets_a_running_answer_finish(tmp_path: Path, embedder_cache: Path) -> None:
    environ = environment(tmp_path / "data", embedder_cache, UNIROUTE_ADMIN_KEY=ADMIN_KEY)
    with ScriptedUpstream(lambda _: "42", slow_s=1.0) as slow:
        config = config_file(tmp_path, slow, profile={"on_start": False})
        with ServeCommand("--config", config, environ=environ, log=tmp_path / "log.txt") as server:
            question = {"model": "small", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
            with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=question, timeout=20) as answer:
                os.kill(server.pid, signal.SIGTERM)
                text = answer.read().decode()
            assert "[DONE]" in text
            assert server.stop() == 0
    assert not store_answers(tmp_path / "data")


def test_detected_models_are_offered_by_reference_to_their_key(tmp_path: Path, embedder_cache: Path) -> None:
    environ = environment(
        tmp_path / "data", embedder_cache, DEEPSEEK_API_KEY="canary", UNIROUTE_PROFILE_ON_START="false"
    )
    with ServeCommand("--detect", environ=environ, log=tmp_path / "log.txt") as server:
        listed = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert {"deepseek/deepseek-v4-flash", "deepseek/deepseek-v4-pro"} <= {model["id"] for model in listed}
    assert "canary" not in server.log


def test_a_descriptor_that_is_no_bound_tcp_socket_is_refused_and_stays_open() -> None:
    unbound, datagrams = socket.socket(), socket.socket(type=socket.SOCK_DGRAM)
    local, other = socket.socketpair()
    with unbound, datagrams, local, other:
        datagrams.bind(("127.0.0.1", 0))
        for refused, why in ((unbound, "not bound"), (datagrams, "not a TCP socket"), (local, "not a TCP socket")):
            with pytest.raises(SettingsError, match=why):
                inherited_socket(refused.fileno())
            assert refused.getsockname() is not None
    with pytest.raises(SettingsError, match="not an open socket"):
        inherited_socket(unbound.fileno() + 2**20)


def test_serving_on_a_descriptor_that_is_not_open_is_a_bad_argument(
    served: tuple[ServeCommand, dict[str, str]],
) -> None:
    ended = run_command("serve", "--fd", "999", environ=served[1])
    assert ended.returncode == 2
    assert "--fd: 999 is not an open socket" in ended.stderr
