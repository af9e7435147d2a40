"""Proxies with four models in a known order, and timeouts short enough to wait for.

A test module may set its own by the name LIMITS.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.proxy_process import NO_COOLDOWN, ProxyProcess, model_entry
from tests.support.scripted_upstream import ScriptedUpstream

ASK: Any = [{"role": "user", "content": "What is 2 + 2?"}]
LIMITS = {"request_timeout_s": 10, "idle_timeout_s": 1, "stream_timeout_s": 4, "keep_alive_s": 60}


def says(words: str) -> Callable[[str], str]:
    return lambda _: words


@dataclass(frozen=True)
class RankedProxy:
    """Hold four models in a known order. At λ=0.1 first is chosen, then second, third, fourth."""

    proxy: ProxyProcess
    models: tuple[ScriptedUpstream, ...]

    @property
    def request_counts(self) -> list[int]:
        return [len(model.history) for model in self.models]


@pytest.fixture(scope="session")
def rankings(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Callable[..., RankedProxy]]:
    """Open one proxy for each mode and limits, if a test wants it."""
    with contextlib.ExitStack() as closing:

        @cache
        def opened(mode: str, **limits: float) -> RankedProxy:
            folder = tmp_path_factory.mktemp("ranked")
            return closing.enter_context(open_ranked(folder, embedder_cache, mode, limits))

        yield opened


@contextlib.contextmanager
def open_ranked(folder: Path, embedder_cache: Path, mode: str, limits: Mapping[str, float]) -> Iterator[RankedProxy]:
    names = ("first", "second", "third", "fourth")
    with contextlib.ExitStack() as closing:
        models = [closing.enter_context(ScriptedUpstream(says(f"The {name} answer."))) for name in names]
        entries = [model_entry(name, models[place].url, price=1e-7, forward=mode) for place, name in enumerate(names)]
        config = {
            "model_list": entries,
            "uniroute": {**limits, "profile": {"on_start": False}, "breaker": NO_COOLDOWN},
        }
        proxy = closing.enter_context(ProxyProcess(folder, embedder_cache, config, {"MODEL_API_KEY": "sk-ranked"}))
        for place, name in enumerate(names):
            proxy.put_profile(name, 0.1 + 0.1 * place)
        with httpx.Client(base_url=proxy.url, timeout=120) as http:
            for stream in (False, True):  # the first calls through litellm import more of it, which takes its time
                ask(http, model="first", stream=stream)
        yield RankedProxy(proxy, tuple(models))


@pytest.fixture(params=["relay", "translate"])
def ranked(rankings: Callable[..., RankedProxy], request: pytest.FixtureRequest) -> RankedProxy:
    opened = rankings(request.param, **getattr(request.module, "LIMITS", LIMITS))
    for model in opened.models:
        model.reset()
    return opened


@pytest.fixture
def asking(ranked: RankedProxy) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=ranked.proxy.url, timeout=60) as opened:
        yield opened


def ask(http: httpx.Client, **body: Any) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"model": "auto", "messages": ASK, **body})


def error_of(events: list[Any]) -> str:
    return str(events[-1]["error"]["message"])
