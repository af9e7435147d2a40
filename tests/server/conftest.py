from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.server.ranked_proxy import asking, ranked, rankings
from tests.support.keyed_proxy import KeyedProxy
from tests.support.proxy_process import NO_COOLDOWN, ProxyProcess, model_entry
from tests.support.scripted_upstream import ScriptedUpstream

__all__ = ["asking", "ranked", "rankings"]

# The provider key of the models: only the upstreams may see it.
CANARY = "sk-canary-3f9a7c"
HEADERS = {"authorization": "Bearer whatever"}


@dataclass(frozen=True)
class Fleet:
    """Hold the proxy and its upstreams. At λ=0.1 "fair" is chosen, at λ=0 "good"."""

    proxy: ProxyProcess
    fair: ScriptedUpstream
    good: ScriptedUpstream

    @property
    def url(self) -> str:
        return self.proxy.url

    @property
    def base_url(self) -> str:
        return f"{self.proxy.url}/v1"


@contextmanager
def open_fleet(folder: Path, embedder_cache: Path, **more: Any) -> Iterator[Fleet]:
    """Open a fleet. `more`: settings of its own, and `model_info` of both models as `info`."""
    info = more.pop("info", {})
    with ScriptedUpstream(lambda _: "The fair answer.") as fair, ScriptedUpstream(lambda _: "The good answer.") as good:
        config = {
            "model_list": [
                model_entry("fair", fair.url, price=1e-7, supports_function_calling=True, **info),
                model_entry("good", good.url, price=1e-5, supports_function_calling=True, supports_vision=True, **info),
            ],
            "uniroute": {
                "route_names": ["*"],
                "max_body_bytes": 1_000_000,
                "profile": {"on_start": False},
                **more,
            },
        }
        with ProxyProcess(folder, embedder_cache, config, {"MODEL_API_KEY": CANARY}) as proxy:
            proxy.put_profile("fair", 0.3)
            proxy.put_profile("good", 0.1)
            yield Fleet(proxy, fair, good)


# For tests of what must be the same in both modes. By itself a model is called directly.
BOTH_MODES = pytest.mark.parametrize("fleet", ["auto", "translate"], indirect=True)


@pytest.fixture(scope="session")
def fleets(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Callable[[str], Fleet]]:
    """Open one fleet for each mode in which models are called, if a test wants it."""
    with ExitStack() as closing:

        @cache
        def opened(mode: str) -> Fleet:
            folder = tmp_path_factory.mktemp("proxy")
            return closing.enter_context(
                open_fleet(folder, embedder_cache, breaker=NO_COOLDOWN, info={"forward": mode})
            )

        yield opened


@pytest.fixture
def fleet(fleets: Callable[[str], Fleet], request: pytest.FixtureRequest) -> Fleet:
    fleet = fleets(getattr(request, "param", "auto"))
    for upstream in (fleet.fair, fleet.good):
        upstream.reset()
    return fleet


@pytest.fixture
def client(fleet: Fleet) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=fleet.base_url, api_key="none", max_retries=0, timeout=60) as opened:
        yield opened


@pytest.fixture
async def async_client(fleet: Fleet) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=fleet.base_url, api_key="none", max_retries=0, timeout=60) as opened:
        yield opened


@pytest.fixture
def http(fleet: Fleet) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fleet.url, timeout=60) as opened:
        yield opened


@pytest.fixture(scope="session")
def keyed_proxy(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[KeyedProxy]:
    """Start a proxy with client keys. At λ=0.1 "fair" is chosen, at λ=0 "good"."""
    with ScriptedUpstream() as upstream:
        config = {
            "model_list": [
                model_entry("fair", upstream.url, price=1e-7),
                model_entry("good", upstream.url, price=1e-5),
            ],
            "uniroute": {"profile": {"on_start": False}},
        }
        folder = tmp_path_factory.mktemp("admin-keys")
        environ = {"MODEL_API_KEY": "sk-x"}
        with ProxyProcess(folder, embedder_cache, config, environ) as proxy, KeyedProxy(proxy) as opened:
            proxy.put_profile("fair", 0.3)
            proxy.put_profile("good", 0.1)
            opened.make(name="closes the door")
            yield opened
