from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from proxy.cli.serve import print_models
from proxy.settings.schema import Settings
from tests.support.command import ADMIN_KEY, ServeCommand, environment, run_command
from tests.support.program import Process, start_program
from tests.support.proxy_process import uniform_profile
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until


@pytest.fixture
def upstream() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream(lambda _: "42", slow_s=0.1) as started:
        yield started


@contextmanager
def files_over_http(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@contextmanager
def a_worker(environ: Mapping[str, str], log: Path) -> Iterator[Process]:
    with log.open("wb") as output:
        process = start_program("proxy.cli", "worker", environ=environ, stdout=output, stderr=output)
    try:
        assert wait_until(lambda: "measuring models for the store" in log.read_text()), log.read_text()
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0


def test_a_worker_ends_the_job_of_a_server_that_has_stopped(
    tmp_path: Path, upstream: ScriptedUpstream, embedder_cache: Path
) -> None:
    environ = environment(tmp_path / "data", embedder_cache, UNIROUTE_ADMIN_KEY=ADMIN_KEY)
    log = tmp_path / "worker.txt"
    with ServeCommand(environ=environ, log=tmp_path / "serve.txt") as server, a_worker(environ, log):
        arguments = ("models", "add", "late", "--model", "openai/late", "--api-base", upstream.url, "--free")
        added = run_command(*arguments, "--prompts", "80", "--no-wait", "--url", server.url, environ=environ)
        assert added.returncode == 0, added.stderr
        server.stop()
        assert wait_until(lambda: "for model late: ready" in log.read_text()), log.read_text()
    assert len(upstream.history) < 90  # what the server had asked is not asked again


def test_prices_are_fetched_into_the_store_and_a_broken_feed_leaves_the_last_good(tmp_path: Path) -> None:
    model = {"model_name": "small", "litellm_params": {"model": "openai/of-my-own"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model_list": [model]}))
    prices = {"mode": "chat", "input_cost_per_token": 3e-6, "output_cost_per_token": 6e-6}
    (tmp_path / "good.json").write_text(json.dumps({"openai/of-my-own": prices}))
    (tmp_path / "broken.json").write_text(json.dumps({"openai/of-my-own": {**prices, "input_cost_per_token": -1}}))
    environ = environment(tmp_path / "data", UNIROUTE_CONFIG=str(tmp_path / "config.yaml"))
    with files_over_http(tmp_path) as url:
        first = json.loads(run_command("prices", "sync", f"{url}/good.json", "--json", environ=environ).stdout)
        broken = run_command("prices", "sync", f"{url}/broken.json", environ=environ)
        again = json.loads(run_command("prices", "sync", f"{url}/good.json", "--json", environ=environ).stdout)
    assert first["updated"]["small"]["input_cost_per_token"] == 3e-6
    assert (broken.returncode, broken.stdout, broken.stderr.count("\n")) == (1, "", 1)
    assert "input_cost_per_token" in broken.stderr
    assert (again["updated"], again["unchanged"]) == ({}, ["small"])


def test_prices_of_the_bundled_map_are_fetched_where_no_url_is_given(tmp_path: Path) -> None:
    model = {"model_name": "small", "litellm_params": {"model": "openai/gpt-6-luna"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model_list": [model]}))
    environ = environment(tmp_path / "data", UNIROUTE_CONFIG=str(tmp_path / "config.yaml"))
    report = json.loads(run_command("prices", "sync", "--json", environ=environ).stdout)
    assert (report["source"], report["unknown"]) == ("litellm", [])


def test_prices_of_no_model_are_said_to_be_of_none(tmp_path: Path) -> None:
    ended = run_command("prices", "sync", environ=environment(tmp_path / "data"))
    assert (ended.returncode, "--config FILE" in ended.stderr) == (0, True)


def test_a_fitted_map_is_served_and_models_are_measured_on_it(
    tmp_path: Path, upstream: ScriptedUpstream, embedder_cache: Path
) -> None:
    environ = environment(tmp_path / "data", embedder_cache, UNIROUTE_ADMIN_KEY=ADMIN_KEY)
    (tmp_path / "a.txt").write_text("\n".join(f"add {n} and {n + 1}\nsing of river {n}" for n in range(20)))
    fitting = ("fit", tmp_path / "a.txt", "--clusters", "4", "--out", tmp_path / "map", "--json")
    fitted: dict[str, Any] = json.loads(run_command(*fitting, environ=environ).stdout)
    (tmp_path / "foreign.json").write_text(json.dumps(uniform_profile(0.5)))
    environ["UNIROUTE_MAP"] = str(tmp_path / "map")
    adding = ("--model", "openai/a", "--api-base", upstream.url, "--free", "--json")
    with ServeCommand(environ=environ, log=tmp_path / "log.txt") as server:
        environ["UNIROUTE_URL"] = server.url
        card = json.loads(run_command("models", "add", "own", *adding, "--prompts", "20", environ=environ).stdout)
        foreign = ("models", "add", "other", *adding, "--profile", tmp_path / "foreign.json")
        refused = run_command(*foreign, environ=environ)
    assert card["state"] == "ready"
    assert (card["profile"]["map"], len(card["profile"]["errors"])) == (fitted["map"], 4)
    assert (refused.returncode, fitted["map"] in refused.stderr) == (1, True)


def test_a_server_that_cannot_start_says_why_without_a_traceback(tmp_path: Path, embedder_cache: Path) -> None:
    environ = environment(tmp_path / "data", embedder_cache, UNIROUTE_EMBEDDER="transformer")
    ended = run_command("serve", "--port", "0", environ=environ)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "ERROR uniroute UNIROUTE_EMBEDDER: 'transformer'" in ended.stderr


def test_what_the_configuration_counts_on_is_named_at_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    params = {"model": "openai/small", "api_key": "os.environ/ABSENT_API_KEY"}
    model = {"model_name": "small", "litellm_params": params}
    print_models(Settings.model_validate({"model_list": [model], "default_model": "later"}), environ={})
    logged = capsys.readouterr().err
    assert "ABSENT_API_KEY is not set" in logged
    assert "'later' is not configured" in logged
