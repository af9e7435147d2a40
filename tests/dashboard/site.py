"""A server with models that differ, and a browser's part of logging in to its page."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
import pytest
from redis import Redis

from router_core.artifact import builtin_map
from tests.support.proxy_process import ADMIN_KEY, NO_COOLDOWN, ProxyProcess, model_entry
from tests.support.scripted_upstream import ScriptedUpstream

# Name, mean error, USD a token of the prompt.
MODELS = (("large", 0.13, 3e-6), ("medium", 0.22, 4e-7), ("small", 0.34, 1e-7), ("coder-7b", 0.3, 1.5e-7))


@dataclass(frozen=True)
class Site:
    proxy: ProxyProcess
    upstream: ScriptedUpstream

    @property
    def url(self) -> str:
        return f"{self.proxy.url}/dashboard"

    def make_key(self, role: str, **more: Any) -> dict[str, Any]:
        reply = self.proxy.admin("POST", "/admin/keys", {"name": f"a {role}", "role": role, **more})
        assert reply.status_code == 201, reply.text
        made: dict[str, Any] = reply.json()
        return made

    def ask(self, prompt: str, **more: Any) -> str:
        """Have a prompt answered, with feedback if `score` is given; return the decision."""
        score = more.pop("score", None)
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        body = {"model": "auto", "messages": [{"role": "user", "content": prompt}], **more}
        with httpx.Client(base_url=self.proxy.url, headers=headers, timeout=60) as client:
            reply = client.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            decision = reply.headers["x-uniroute-decision"]
            if score is not None:
                said = client.post("/v1/feedback", json={"decision": decision, "score": score, "source": "tests"})
                assert said.json()["labels"] == pytest.approx(1, abs=0.01), said.text
        return decision

    @contextmanager
    def store(self) -> Iterator[Redis]:
        """Open the embedded store as another program would."""
        with Redis(unix_socket_path=str(self.proxy.folder / "valkey" / "valkey.sock"), decode_responses=True) as client:
            yield client

    def remember(self, model: str, *hours: tuple[float, float, float]) -> None:
        """Let feedback on a model be older than it is: labels, errors and expected errors of the hours up to this.

        The model must have been given feedback just now.
        """
        key, now = f"uniroute:observed:{model}:hours", int(time.time() // 3600)
        with self.store() as store:
            assert store.hget(key, "for"), "there is no feedback on it yet"
            for back, amounts in enumerate(reversed(hours)):
                for kind, amount in zip("nex", amounts, strict=True):
                    store.hset(key, f"{kind}:{now - back}", str(amount))

    @contextmanager
    def visitor(self, key: str | None = ADMIN_KEY) -> Iterator[Visitor]:
        with httpx.Client(base_url=self.url, timeout=60, headers={"origin": self.proxy.url}) as client:
            visitor = Visitor(client)
            if key is not None:
                reply = visitor.log_in(key)
                assert reply.status_code == 303, reply.text
            yield visitor


@dataclass(frozen=True)
class Visitor:
    """Visit the page as a browser does: with its cookie and its forms' token."""

    client: httpx.Client

    def log_in(self, key: str) -> httpx.Response:
        return self.send("/login", {"key": key}, page="/login")

    def get(self, path: str = "") -> httpx.Response:
        """Ask for a page, again as long as it is being computed. The path may be an address."""
        while (reply := self.client.get(path)).headers.get("refresh"):
            assert "One moment" in reply.text
        return reply

    def send(self, path: str, form: dict[str, str], page: str = "/explain") -> httpx.Response:
        """Send a form with the token that `page` has."""
        return self.client.post(path, data={"token": token_in(self.get(page).text), **form})


def token_in(page: str) -> str:
    found = re.search(r'name="token" value="([^"]+)"', page)
    assert found, page[:300]
    return found[1]


def varied_profile(name: str, mean: float, *, seed: int, labels: float = 4.0) -> dict[str, Any]:
    """Return a profile that is better in some clusters than in others."""
    cluster_map = builtin_map()
    rng = np.random.default_rng(seed)
    hardness = np.random.default_rng(0).normal(0.0, 0.8, cluster_map.size)
    own = rng.normal(0.0, 0.7, cluster_map.size)
    rates = 1 / (1 + np.exp(-(np.log(mean / (1 - mean)) + hardness + own)))
    counts = rng.uniform(0.5 * labels, 1.5 * labels, cluster_map.size)
    answers = counts.tolist()
    return {
        "map": cluster_map.id,
        "error_sums": (rates * counts).tolist(),
        "labels": counts.tolist(),
        "answers": answers,
        "timed_answers": answers,
        "token_sums": (counts * rng.uniform(80, 300, cluster_map.size)).tolist(),
        "second_sums": (counts * rng.uniform(0.4, 3.0)).tolist(),
        "measured_at": "2026-11-20T10:00:00Z",
    }


class WithoutAdminKey(ProxyProcess):
    """Start without UNIROUTE_ADMIN_KEY."""

    def start(self) -> Self:
        self._environ.pop("UNIROUTE_ADMIN_KEY")
        return super().start()


@contextmanager
def open_site(folder: Path, embedder_cache: Path, *, admin_key: bool = True, **more: Any) -> Iterator[Site]:
    with ScriptedUpstream(lambda _: "An answer of the scripted model.") as upstream:
        config = {
            "model_list": [model_entry(name, upstream.url, price=price) for name, _, price in MODELS],
            "uniroute": {"profile": {"on_start": False, "prompts": 8}, "breaker": NO_COOLDOWN, **more},
        }
        process = ProxyProcess if admin_key else WithoutAdminKey
        with process(folder, embedder_cache, config, {"MODEL_API_KEY": "sk-x"}) as proxy:
            if admin_key:
                for seed, (name, mean, _) in enumerate(MODELS, 1):
                    document = varied_profile(name, mean, seed=seed)
                    reply = proxy.admin("POST", f"/admin/models/{name}/profile", document)
                    assert reply.status_code == 200, reply.text
            yield Site(proxy, upstream)
