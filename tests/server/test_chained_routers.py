from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import BOTH_MODES, Fleet
from tests.support.proxy_process import ProxyProcess, model_entry

BODY: Any = {"model": "fair", "messages": [{"role": "user", "content": "What is 2 + 2?"}]}


def ask(url: str, hops: str | None = None, **body: Any) -> httpx.Response:
    headers = {} if hops is None else {"x-uniroute-hops": hops}
    return httpx.post(f"{url}/v1/chat/completions", json={**BODY, **body}, headers=headers, timeout=60)


@BOTH_MODES
def test_a_request_to_an_upstream_names_the_routers_it_has_passed(fleet: Fleet) -> None:
    assert [ask(fleet.url, hops).status_code for hops in (None, "one", "one, two,three")] == [200] * 3
    sent = [received.headers["x-uniroute-hops"].split(", ") for received in fleet.fair.history]

    assert [hops[:-1] for hops in sent] == [[], ["one"], ["one", "two", "three"]]
    assert len({hops[-1] for hops in sent}) == 1


@pytest.mark.parametrize("hops", ["a, b, c, d", "a,b,c,d,e", ",,,,", "a," * 2000])
def test_more_than_three_routers_are_refused(fleet: Fleet, hops: str) -> None:
    reply = ask(fleet.url, hops)

    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "loop_detected")
    assert "more than 3" in reply.json()["error"]["message"]
    assert fleet.fair.history == []


def test_a_router_that_is_its_own_upstream_says_so(tmp_path: Path, embedder_cache: Path) -> None:
    config = {"model_list": [], "uniroute": {"profile": {"on_start": False}}}
    with ProxyProcess(tmp_path, embedder_cache, config, {"MODEL_API_KEY": "sk-x"}) as proxy:
        me = {
            **model_entry("fair", f"{proxy.url}/v1"),
            "litellm_params": {
                "model": "openai/fair",
                "api_base": f"{proxy.url}/v1",
                "api_key": "os.environ/MODEL_API_KEY",
            },
        }
        assert proxy.admin("POST", "/admin/models", {**me, "profile": {"prompts": 1}}).status_code == 202
        reply = ask(proxy.url)

    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "loop_detected")
    assert "leads back to it" in reply.json()["error"]["message"]
