from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.support.command import ADMIN_KEY, ServeCommand, environment
from tests.support.processes import children_of
from tests.support.proxy_process import model_entry, uniform_profile
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until

ASK: Any = [{"role": "user", "content": "What is 2 + 2?"}]
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
# Libraries that come with openai and litellm, and with nothing else that is served with.
OF_LITELLM = ("/jiter", "/tiktoken")
KEY = "sk-canary-of-groq"


@contextmanager
def serving(
    folder: Path, embedder_cache: Path, upstream: ScriptedUpstream, *arguments: str, **info: Any
) -> Iterator[ServeCommand]:
    config = {"model_list": [model_entry("near", upstream.url, **info)], "uniroute": {"profile": {"on_start": False}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    names = {"UNIROUTE_ADMIN_KEY": ADMIN_KEY, "MODEL_API_KEY": "sk-arm", "GROQ_API_KEY": KEY}
    environ = environment(folder / "data", embedder_cache, **names)
    command = ServeCommand("--config", folder / "config.yaml", *arguments, environ=environ, log=folder / "log.txt")
    command.wrapper = ["env"]  # an interpreter of its own, as what it loads is looked at
    with command as server:
        reply = admin(server, "POST", "/near/profile", uniform_profile(0.1))
        assert reply.status_code == 200, reply.text
        yield server


def admin(server: ServeCommand, method: str, path: str, body: Any = None) -> httpx.Response:
    return httpx.request(method, f"{server.url}/admin/models{path}", json=body, headers=ADMIN, timeout=60)


def add(server: ServeCommand, name: str, upstream: ScriptedUpstream, forward: str = "auto", **params: Any) -> None:
    all_params = {"model": f"openai/{name}", "api_base": upstream.url, "api_key": "os.environ/MODEL_API_KEY", **params}
    entry = {
        "model_name": name,
        "litellm_params": {key: value for key, value in all_params.items() if value is not None},
    }
    info = {"input_cost_per_token": 1e-9, "output_cost_per_token": 1e-9, "forward": forward}
    reply = admin(server, "POST", "", {**entry, "model_info": info, "profile": uniform_profile(0.01)})
    assert reply.status_code == 201, reply.text


def ask(server: ServeCommand, model: str = "auto", path: str = "chat/completions", **body: Any) -> httpx.Response:
    reply = httpx.post(f"{server.url}/v1/{path}", json={"model": model, "messages": ASK, **body}, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply


def holds_litellm(pid: int) -> bool:
    mapped = Path(f"/proc/{pid}/maps").read_text()
    return any(name in mapped for name in OF_LITELLM)


def serving_pids(server: ServeCommand) -> list[int]:
    """Return the processes that have loaded the event loop's library: a store has not, nor a tracker of resources."""
    family = [server.pid, *children_of(server.pid)]
    return [pid for pid in family if "/uvloop" in Path(f"/proc/{pid}/maps").read_text()]


@pytest.fixture(scope="module")
def upstream() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream(lambda _: "An answer.") as started:
        yield started


@pytest.fixture(scope="module")
def direct(
    tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path, upstream: ScriptedUpstream
) -> Iterator[ServeCommand]:
    with serving(tmp_path_factory.mktemp("direct"), embedder_cache, upstream) as server:
        yield server


def test_a_server_with_direct_models_only_never_imports_litellm(
    direct: ServeCommand, upstream: ScriptedUpstream
) -> None:
    ask(direct)
    ask(direct, stream=True)
    add(direct, "fast", upstream, model="groq/llama", api_key="os.environ/GROQ_API_KEY")
    ask(direct, "fast", max_completion_tokens=5)
    seen = upstream.last
    changed = {"litellm_params": {"model": "openai/other", "api_key": None}}
    assert admin(direct, "PATCH", "/fast", changed).status_code == 200
    ask(direct, "fast", max_completion_tokens=5)
    resolved = (Path(direct.environ["UNIROUTE_DATA_DIR"]) / "providers.json").read_text()

    assert serving_pids(direct) == [direct.pid]
    assert not holds_litellm(direct.pid)
    assert "loading litellm" not in direct.log
    assert (seen.headers["authorization"], seen.body["model"], seen.body["max_tokens"]) == (f"Bearer {KEY}", "llama", 5)
    assert (upstream.last.body["model"], upstream.last.body["max_completion_tokens"]) == ("other", 5)
    assert "authorization" not in upstream.last.headers  # groq's key is groq's
    assert KEY not in resolved + direct.log


@pytest.mark.parametrize(
    ("model", "forward", "message"),
    [
        ("nonsense/x", "auto", "no provider is known by its name 'nonsense/x'"),
        ("anthropic/x", "relay", "forward: relay needs api_base"),
    ],
)
def test_a_model_that_cannot_be_resolved_is_refused_and_stores_nothing(
    direct: ServeCommand, model: str, forward: str, message: str
) -> None:
    entry = {"model_name": "odd", "litellm_params": {"model": model}}
    info = {"free": True, "forward": forward}
    reply = admin(direct, "POST", "", {**entry, "model_info": info, "profile": uniform_profile(0.1)})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "litellm_params.model")
    assert message in reply.json()["error"]["message"]
    assert admin(direct, "GET", "/odd").status_code == 404


def test_a_translated_model_becomes_eligible_once_every_worker_has_imported_litellm(
    tmp_path: Path, embedder_cache: Path, upstream: ScriptedUpstream
) -> None:
    with serving(tmp_path, embedder_cache, upstream, "--workers", "2") as server:
        assert wait_until(lambda: len(serving_pids(server)) == 2)  # one of them is ready before the other
        both = serving_pids(server)
        assert not any(holds_litellm(pid) for pid in both)
        add(server, "far", upstream, "translate")
        wait_until(lambda: ask(server, path="route").json()["ineligible"])  # the other worker may see it a moment later
        early = ask(server, path="route").json()
        reply = ask(server)
        assert wait_until(lambda: all(map(holds_litellm, both)))
        assert wait_until(lambda: {ask(server, path="route").json()["model"] for _ in range(20)} == {"far"})
        answered = {ask(server).headers["x-uniroute-model"] for _ in range(20)}

    assert len(both) == 2
    assert early["model"] == "near"
    assert [each["model"] for each in early["ineligible"]] == ["far"]
    assert "load" in early["ineligible"][0]["why"]
    assert reply.headers["x-uniroute-model"] == "near"
    assert answered == {"far"}


def test_a_server_that_translates_from_the_start_is_ready_once_litellm_is_imported(
    tmp_path: Path, embedder_cache: Path, upstream: ScriptedUpstream
) -> None:
    with serving(tmp_path, embedder_cache, upstream, forward="translate") as server:
        assert holds_litellm(server.pid)
        assert ask(server).headers["x-uniroute-model"] == "near"
