from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.client_apis import APIName, Reply, ask, body_of
from tests.support.otlp_receiver import OTLPReceiver, ReceivedSpan
from tests.support.proxy_process import NO_COOLDOWN, ProxyProcess, model_entry
from tests.support.scripted_upstream import ScriptedUpstream

# Of what the SDK waits for before it sends.
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "50", "OTEL_METRIC_EXPORT_INTERVAL": "100"}


@dataclass
class Observed:
    """A proxy whose traces and metrics are sent. At λ=0.1 "fair" is chosen, and "good" is the fallback."""

    proxy: ProxyProcess
    receiver: OTLPReceiver
    fair: ScriptedUpstream
    good: ScriptedUpstream
    asked: int = 0

    def ask(self, api: APIName = "chat", headers: dict[str, str] | None = None, **more: Any) -> tuple[str, Reply]:
        """Ask in one of the APIs; return the request's id, and what the client has read."""
        self.asked += 1
        request_id = f"asked-{self.asked}"
        with httpx.Client(base_url=self.proxy.url, timeout=60) as http:
            return request_id, ask(
                http, api, body_of(api, **more), headers={"x-request-id": request_id, **(headers or {})}
            )

    def traced(self, api: APIName = "chat", **more: Any) -> tuple[ReceivedSpan, list[ReceivedSpan], Reply]:
        """Ask, and return the request's span, those of its attempts, and the reply."""
        request_id, reply = self.ask(api, **more)
        server, attempts = self.receiver.wait_for_trace(request_id)
        return server, attempts, reply


@contextmanager
def observed_proxy(
    folder: Path, embedder_cache: Path, receiver: OTLPReceiver, more: dict[str, str] | None = None, **settings: Any
) -> Iterator[Observed]:
    with ScriptedUpstream(lambda _: "The fair answer.") as fair, ScriptedUpstream(lambda _: "The good answer.") as good:
        vectors = model_entry("vectors", fair.url)
        vectors["model_info"] = {"mode": "embedding", "input_cost_per_token": 1e-6}
        config = {
            "model_list": [
                model_entry("fair", fair.url, price=1e-7),
                model_entry("good", good.url, price=1e-5),
                vectors,
                model_entry("native", fair.url, api=["chat", "messages", "responses"], supports_reasoning=True),
            ],
            "uniroute": {"route_names": ["*"], "profile": {"on_start": False}, "breaker": NO_COOLDOWN, **settings},
        }
        environ = {"MODEL_API_KEY": "sk-x", "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, **SOON, **(more or {})}
        with ProxyProcess(folder, embedder_cache, config, environ) as proxy:
            proxy.put_profile("fair", 0.3)
            proxy.put_profile("good", 0.1)
            yield Observed(proxy, receiver, fair, good)


@pytest.fixture(scope="package")
def started(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Observed]:
    with (
        OTLPReceiver() as receiver,
        observed_proxy(tmp_path_factory.mktemp("observed"), embedder_cache, receiver) as observed,
    ):
        yield observed


@pytest.fixture
def observed(started: Observed) -> Observed:
    for upstream in (started.fair, started.good):
        upstream.reset()
    return started
