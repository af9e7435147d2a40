"""Start one `uniroute serve` per session to attack: two models, an admin key, the limits of a small machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.support.command import ADMIN_KEY, ServeCommand, environment
from tests.support.proxy_process import model_entry, uniform_profile
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import until_taken

PROVIDER_KEY = "sk-canary-of-the-provider"
MAX_BODY_BYTES = 1_000_000
ASK: Any = [{"role": "user", "content": "What is 2 + 2?"}]
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}


@dataclass(frozen=True)
class Attacked:
    """Hold the proxy and its upstreams. At λ=0.1 "fair" is chosen, at λ=0 "good"."""

    server: ServeCommand
    fair: ScriptedUpstream
    good: ScriptedUpstream

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.server.url)
        return url.host, url.port or 80


# For tests of what an upstream does: by itself it is called directly.
BOTH_MODES = pytest.mark.parametrize("attacked", ["auto", "translate"], indirect=True)


@pytest.fixture(scope="session")
def attacked_by_mode(
    tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path
) -> Iterator[Callable[[str], Attacked]]:
    """Start one server for each mode in which models are called, if a test wants it."""
    with ExitStack() as closing:

        @cache
        def opened(mode: str) -> Attacked:
            return closing.enter_context(open_attacked(tmp_path_factory.mktemp("attacked"), embedder_cache, mode))

        yield opened


@contextmanager
def open_attacked(folder: Path, embedder_cache: Path, mode: str) -> Iterator[Attacked]:
    environ = environment(folder / "data", embedder_cache, UNIROUTE_ADMIN_KEY=ADMIN_KEY, MODEL_API_KEY=PROVIDER_KEY)
    with ScriptedUpstream(lambda _: "The fair answer.") as fair, ScriptedUpstream(lambda _: "The good answer.") as good:
        able: dict[str, Any] = {"supports_function_calling": True, "supports_vision": True}
        able["forward"] = mode
        config = {
            "model_list": [
                model_entry("fair", fair.url, price=1e-7, **able),
                model_entry("good", good.url, price=1e-5, **able),
            ],
            "uniroute": {"max_body_bytes": MAX_BODY_BYTES, "profile": {"on_start": False}},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        with ServeCommand(
            "--config", folder / "config.yaml", environ=environ, log=folder / "log.txt", translates=mode == "translate"
        ) as server:
            for name, error in (("fair", 0.3), ("good", 0.1)):
                url = f"{server.url}/admin/models/{name}/profile"
                until_taken(partial(httpx.post, url, json=uniform_profile(error), headers=ADMIN))
            yield Attacked(server, fair, good)


@pytest.fixture
def attacked(attacked_by_mode: Callable[[str], Attacked], request: pytest.FixtureRequest) -> Attacked:
    opened = attacked_by_mode(getattr(request, "param", "auto"))
    for upstream in (opened.fair, opened.good):
        upstream.reset()
    return opened


@pytest.fixture
def http(attacked: Attacked) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=attacked.server.url, timeout=60) as opened:
        yield opened
