from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.gateway import QUESTION, a_gateway, counted
from tests.support.proxy_process import model_entry
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.valkey import ValkeyServer
from tests.support.waiting import wait_until

PAGE = Path(__file__).parent.parent.parent / "docs" / "reliability.md"


def documented_rule() -> list[str]:
    line = next(line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("ACL SETUSER uniroute on"))
    return line.replace(">PASSWORD", ">pw").split()


@pytest.mark.slow
def test_the_documented_redis_user_may_do_all_that_a_server_does(tmp_path: Path, embedder_cache: Path) -> None:
    with ValkeyServer(tmp_path / "valkey") as valkey, valkey.client() as client, ScriptedUpstream(lambda _: "42") as up:
        client.execute_command(*documented_rule())
        client.execute_command("ACL", "SETUSER", "default", "+@all")
        environ = {"UNIROUTE_REDIS_URL": f"redis://127.0.0.1:{valkey.port}/1"}
        environ |= {"UNIROUTE_REDIS_USERNAME": "uniroute", "UNIROUTE_REDIS_PASSWORD": "pw"}
        section: dict[str, Any] = {"price_refresh_minutes": 60, "breaker": {"failures": 1, "cooldown_s": 1}}
        with a_gateway(tmp_path, embedder_cache, up, environ=environ, **section) as gateway:
            key = gateway.admin("POST", "/keys", {"name": "k", "usd_per_day": 5, "tokens_per_minute": 10**6}).json()
            rotated = gateway.admin("POST", f"/keys/{key['id']}/rotate", {"grace_s": 60})
            gateway.client_key = rotated.json()["key"]
            assert wait_until(lambda: gateway.ask().status_code == 200), (gateway.ask().text, rotated.text)
            session = {"x-session-id": "a", **gateway.headers}
            for _ in range(2):
                body = {"model": "auto", "messages": QUESTION}
                httpx.post(f"{gateway.url}/v1/chat/completions", json=body, headers=session, timeout=60)
            made = gateway.admin("POST", "/models", {**model_entry("asked", up.url), "profile": {"prompts": 24}}).json()
            assert wait_until(lambda: gateway.admin("GET", f"/jobs/{made['job']}").json()["state"] == "ready")
            gateway.put_price()
            gateway.admin("PATCH", "/models/asked", {"model_info": {"max_input_tokens": 9000}})
            gateway.admin("DELETE", f"/jobs/{made['job']}")
            gateway.admin("DELETE", "/models/asked")
            gateway.admin("DELETE", f"/keys/{key['id']}")
            assert gateway.admin("GET", "/audit").status_code == 200
        client.select(1)
        assert counted(client) >= 3
        denied: Any = client.execute_command("ACL", "LOG")
        assert [(entry["object"], entry["reason"]) for entry in denied] == []
        assert [key for key in client.scan_iter() if not key.startswith("uniroute:")] == []
