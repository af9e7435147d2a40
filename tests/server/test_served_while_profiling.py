from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.command import run_command
from tests.support.proxy_process import ADMIN_KEY, ProxyProcess, model_entry
from tests.support.scripted_answers import Step
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until

BODY: Any = {"model": "auto", "messages": [{"role": "user", "content": "What is 2 + 2?"}]}
REASON = "bad answered with status 401; the provider refuses the key: check litellm_params.api_key and its variable"


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[ProxyProcess]:
    """Serve while three models are measured: one never answers, one has a wrong key, one is not there."""
    with ScriptedUpstream() as silent, ScriptedUpstream() as strict:
        silent.always, strict.always = Step(hang=True), Step(status=401, body={"error": {"message": "Bad key sk-x"}})
        gone = model_entry("gone", "http://127.0.0.1:1/v1")
        config = {
            "model_list": [model_entry("slow", silent.url), model_entry("bad", strict.url)],
            "uniroute": {"profile": {"prompts": 12}},
        }
        folder = tmp_path_factory.mktemp("measured")
        with ProxyProcess(folder, embedder_cache, config, {"MODEL_API_KEY": "sk-x"}) as opened:
            assert wait_until(lambda: bool(silent.history) and card(opened, "bad")["state"] == "failed")
            opened.admin("POST", "/admin/models", {**gone, "profile": {"prompts": 1}})
            yield opened


def card(proxy: ProxyProcess, name: str) -> dict[str, Any]:
    found: dict[str, Any] = proxy.admin("GET", f"/admin/models/{name}").json()
    return found


def ask(proxy: ProxyProcess, **body: Any) -> httpx.Response:
    return httpx.post(f"{proxy.url}/v1/chat/completions", json={**BODY, **body}, timeout=60)


def test_a_routed_request_is_refused_with_the_progress_of_profiling_and_what_failed(proxy: ProxyProcess) -> None:
    reply = ask(proxy)
    message = reply.json()["error"]["message"]

    assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
    assert f"measuring it failed: 5 prompts in a row failed: {REASON}" in message
    assert "slow: 0 of 12 prompts are done" in message
    assert message.endswith("; set default_model, and that model answers meanwhile")


def test_a_model_whose_key_is_refused_is_listed_as_failed_with_the_reason(proxy: ProxyProcess) -> None:
    listed = card(proxy, "bad")

    assert (listed["state"], REASON in listed["why"]) == ("failed", True)
    assert wait_until(lambda: f"measuring model bad failed: 5 prompts in a row failed: {REASON}" in proxy.log)
    assert "sk-x" not in proxy.log + listed["why"]


def test_the_list_of_models_says_what_went_wrong(proxy: ProxyProcess) -> None:
    environ = {"UNIROUTE_ADMIN_KEY": ADMIN_KEY, "UNIROUTE_URL": proxy.url}
    listed = run_command("models", "list", environ=environ)

    assert "profiling 0/12" in listed.stdout
    assert f"bad: 5 prompts in a row failed: {REASON}" in listed.stderr


def test_the_error_of_a_pinned_request_names_the_provider_key_that_was_refused(proxy: ProxyProcess) -> None:
    reply = ask(proxy, model="bad")

    assert reply.status_code == 401
    assert "the provider refused its key, which is this server's and not yours" in reply.json()["error"]["message"]


def test_a_model_that_cannot_be_reached_is_named_with_its_address_and_the_error(proxy: ProxyProcess) -> None:
    reply = ask(proxy, model="gone")

    assert reply.status_code == 502
    assert reply.json()["error"]["message"] == "gone cannot be reached at 127.0.0.1:1: Connection refused"
