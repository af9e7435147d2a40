"""Measure and route SmolLM2 under llama.cpp. Needs the packages of the extra `demo`."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import yaml

from proxy.cli.local_models import LocalModelError, smollm2, start_llama
from tests.support.command import ServeCommand, environment, run_command
from tests.support.processes import store_answers
from tests.support.proxy_process import uniform_profile


@pytest.fixture(scope="module")
def smollm2_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with start_llama(smollm2(), tmp_path_factory.mktemp("llama") / "log.txt", context=4096) as server:
        yield server.api_base


def test_a_routed_prompt_is_streamed_from_a_real_model(
    smollm2_address: str, tmp_path: Path, embedder_cache: Path
) -> None:
    params = {"model": "openai/smollm2", "api_base": smollm2_address, "temperature": 0, "system": "Answer briefly."}
    model = {"model_name": "smollm2", "litellm_params": params, "model_info": {"free": True}}
    section = {"profile": {"on_start": False}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model_list": [model], "uniroute": section}))
    (tmp_path / "profile.json").write_text(json.dumps(uniform_profile(0.8)))
    environ = environment(tmp_path / "data", embedder_cache, UNIROUTE_ADMIN_KEY="admin-of-the-tests")
    with ServeCommand("--config", tmp_path / "config.yaml", environ=environ, log=tmp_path / "log.txt") as server:
        handed = ("models", "profile", "smollm2", "--profile", tmp_path / "profile.json", "--url", server.url)
        assert run_command(*handed, environ=environ).returncode == 0
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            stream = client.chat.completions.create(
                model="auto",
                messages=[{"role": "user", "content": "What is the capital of France?"}],
                max_tokens=40,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces).strip()
    assert len(pieces) > 3
    assert {chunk.model for chunk in chunks} == {"smollm2"}
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 3


def test_a_model_that_cannot_be_loaded_says_so_and_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    with pytest.raises(LocalModelError, match=r"broken\.gguf"):
        start_llama(tmp_path / "broken.gguf", tmp_path / "log.txt")


def test_a_local_model_ends_when_it_is_closed(tmp_path: Path) -> None:
    with start_llama(smollm2(), tmp_path / "log.txt", context=512) as server:
        assert server.process.poll() is None
    assert server.process.returncode == 0


def test_ctrl_c_while_the_demo_serves_leaves_no_store_behind(tmp_path: Path, embedder_cache: Path) -> None:
    code = """
from proxy.cli.demo import BackgroundServer, wait_for_ctrl_c
from proxy.server.run import LOGGING, listen
from proxy.settings.schema import load_settings
import os
settings = load_settings(None, os.environ)
server = BackgroundServer(settings, listen("127.0.0.1", 0), LOGGING)
assert server.start()
wait = server.wait
server.wait = lambda: (print("serving", flush=True), wait())
wait_for_ctrl_c(server)
server.stop()
"""
    environ = environment(tmp_path / "data", embedder_cache)
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "serving\n"
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert (process.returncode, output) == (0, "stopping\n")
    assert not store_answers(tmp_path / "data")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_demo_measures_three_models_and_routes_three_questions(tmp_path: Path, embedder_cache: Path) -> None:
    environ = environment(tmp_path / "data", embedder_cache)
    (tmp_path / "data" / "demo").mkdir()
    for table in embedder_cache.glob("static-*"):
        (tmp_path / "data" / "demo" / table.name).symlink_to(table)
    ended = run_command("demo", "--once", "--port", "0", environ=environ, timeout_s=380)
    assert ended.returncode == 0, ended.stderr
    rows = re.findall(r"^  (smollm2\S*): .* (\d\.\d\d) +\d+ +\d+\.\d$", ended.stdout, re.MULTILINE)
    errors = {name: float(error) for name, error in rows}
    assert errors["smollm2"] < errors["smollm2-word"]
    assert len(re.findall(r"^    smollm2\S*: .", ended.stdout, re.MULTILINE)) == 3
    assert len(ended.stdout.splitlines()) <= 24
    assert max(map(len, ended.stdout.splitlines())) <= 120
