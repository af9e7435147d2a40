from __future__ import annotations

import asyncio
import cProfile
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from uvicorn.server import ServerState

from proxy.app import create_app
from proxy.routing.assigner import ClusterAssigner
from proxy.routing.chat_request import ChatRequest
from proxy.routing.fingerprints import inspect_history
from proxy.routing.requirements import routing_text
from proxy.routing.selection_context import SelectionContext
from proxy.server.dependencies import AppState
from proxy.server.metrics import Metrics
from proxy.server.protocol import LimitedHTTPProtocol
from proxy.server.ratelimit import RateLimiter
from proxy.server.run import server_config
from proxy.settings.schema import Settings
from proxy.storage.records import ModelRecord, StoredProfile
from proxy.storage.redis import Store
from proxy.storage.sessions import SessionStore
from proxy.storage.snapshot import RoutingSnapshot, TrafficStats, build_state
from proxy.storage.state_reader import StoredState
from proxy.storage.traffic_mix import TrafficMix
from proxy.storage.usage_journal import JournalDirectory
from proxy.storage.usage_writer import UsageWriter
from proxy.upstream.concurrency_limit import ConcurrencyLimiter
from proxy.upstream.health import HealthRegistry
from proxy.upstream.payload import JSONPayload
from router_core.artifact import builtin_map
from router_core.eligibility import Eligibility, eligible
from router_core.embedding import StaticEmbedder, Tokenizer
from router_core.scoring import rank
from router_core.types import Assignment
from tests.support.makers import a_record, snapshot_inputs

HEADERS = [("host", "127.0.0.1:8000"), ("content-type", "application/json"), ("user-agent", "bench")]
ANSWER: Mapping[str, Any] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "model": "scripted",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Yes."}}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11},
}
ANSWER_BYTES = json.dumps(ANSWER).encode()
Prepare = Callable[[ChatRequest], Any]


@dataclass(frozen=True)
class FixedSnapshot:
    """Return the same snapshot for ever."""

    current: RoutingSnapshot


class RecordingUpstream:
    """Answer at once, and note when a request came."""

    received_ns = 0
    not_ready: frozenset[str] = frozenset()

    async def complete(self, *_: object, **__: object) -> JSONPayload:
        self.received_ns = time.process_time_ns()
        return JSONPayload(dict(ANSWER), ANSWER_BYTES)


def a_routing_state(models: int) -> RoutingSnapshot:
    """Build a snapshot of measured models at random prices."""
    from router_core.profiles import Profile

    rng = np.random.default_rng(models)
    cluster_map = builtin_map()
    records: dict[str, ModelRecord] = {}
    profiles: dict[str, StoredProfile] = {}
    for number in range(models):
        name = f"model-{number}"
        prices = dict(zip(("input_cost_per_token", "output_cost_per_token"), rng.uniform(1e-7, 1e-5, 2), strict=True))
        records[name] = a_record(name, info={**prices, "max_input_tokens": 200_000})
        rates = {"errors": rng.uniform(size=cluster_map.size).tolist(), "labels": [2.0] * cluster_map.size}
        measured = {"map": cluster_map.id, **rates, "mean_output_tokens": rng.uniform(50, 500), "mean_seconds": 1.0}
        profiles[name] = StoredProfile(records[name].fingerprint, Profile.from_json(measured))
    stored = StoredState(version=1, models=records, profiles=profiles, keys_exist=False)
    return build_state(stored, snapshot_inputs(cluster_map=cluster_map), keys_latched=False)


def open_parts(folder: Path, embedder: StaticEmbedder, state: RoutingSnapshot, closing: AsyncExitStack) -> AppState:
    """Open the app's parts over a store that does not run: a request without a session or a limit needs none."""
    settings = Settings.model_validate({"data_dir": folder})
    store, metrics, assigner = Store(f"unix://{folder}/none"), Metrics(), ClusterAssigner(embedder, 5.0)
    closing.callback(assigner.close)
    closing.push_async_callback(store.close)
    absent: Any = None
    still, noting = FixedSnapshot(state), RecordingUpstream()
    usage = UsageWriter(store, JournalDirectory(folder, 10**9))
    return AppState(
        settings=settings,
        store=store,
        snapshots=still,  # type: ignore[arg-type]
        registry=absent,
        jobs=absent,
        resolver=absent,
        assigner=assigner,
        upstream=noting,  # type: ignore[arg-type]
        usage=usage,
        rate_limiter=RateLimiter(store, metrics),
        metrics=metrics,
        traffic_stats=TrafficStats(state.cluster_map.size),
        traffic_mix=TrafficMix(store, state.cluster_map),
        health=HealthRegistry(settings.breaker),
        concurrency_limiter=ConcurrencyLimiter(),
        sessions=SessionStore(store, 3600),
        responses=absent,
        decisions=absent,
        feedback=absent,
        environ={},
    )


class Transport:
    """Take everything and keep nothing; signal when an answer is whole."""

    def __init__(self) -> None:
        self.answered = asyncio.Event()

    def write(self, data: bytes) -> None:
        if data.endswith(b"}"):
            self.answered.set()

    def get_extra_info(self, _: str, default: object = None) -> object:
        return default

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def close(self) -> None: ...


class Wire:
    """Drive one kept-alive connection, and measure its requests."""

    def __init__(self, services: AppState) -> None:
        self._services = services
        config: uvicorn.Config = server_config(services.settings, logging=None)
        config.load()
        app = create_app(services)
        config.loaded_app = app
        self._app = app
        self._transport = Transport()
        self._connection = LimitedHTTPProtocol(config, ServerState(), {})
        self._connection.connection_made(self._transport)  # type: ignore[arg-type]

    def whole(self) -> dict[str, Callable[[bytes], Awaitable[int]]]:
        return {"socket to upstream": self._to_upstream, "socket to answer": self._to_answer}

    async def _to_upstream(self, raw: bytes) -> int:
        return (await self._exchange(raw))[0]

    async def _to_answer(self, raw: bytes) -> int:
        return (await self._exchange(raw))[1]

    async def _exchange(self, raw: bytes) -> tuple[int, int]:
        upstream: Any = self._services.upstream
        sent = _request(raw)
        self._transport.answered.clear()
        forget(self._services)
        started = time.process_time_ns()
        self._connection.data_received(sent)
        await self._transport.answered.wait()
        ended = time.process_time_ns()
        await asyncio.sleep(0)
        return upstream.received_ns - started, ended - started

    async def profiled(self, bodies: Sequence[bytes], path: str) -> None:
        """Profile what runs on the event loop."""
        for raw in bodies:
            await self._exchange(raw)
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(20):
            for raw in bodies:
                await self._exchange(raw)
        profile.disable()
        profile.dump_stats(path)


def forget(services: AppState) -> None:
    """Clear the cache: most prompts are new, and rounds over the same bodies would flatter."""
    for digest in list(services.assigner._known):
        del services.assigner._known[digest]


def _request(raw: bytes) -> bytes:
    lines = [f"{name}: {value}" for name, value in (*HEADERS, ("content-length", str(len(raw))))]
    return "\r\n".join(("POST /v1/chat/completions HTTP/1.1", *lines, "", "")).encode() + raw


def stage_functions(services: AppState) -> dict[str, tuple[Prepare, Callable[[Any], object]]]:
    """Map each stage to what it gets of a request, and what it does. Their sum leaves out the glue between them."""
    state, settings = services.snapshots.current, services.settings
    embedder, cluster_map = services.assigner.embedder, state.cluster_map
    tokenizer: Tokenizer = embedder._tokenizer  # type: ignore[attr-defined]

    def context(request: ChatRequest) -> SelectionContext:
        return SelectionContext("dec-1", request, None, state, settings)

    def left(request: ChatRequest) -> tuple[SelectionContext, Eligibility, Assignment]:
        one = context(request)
        placed = cluster_map.assign(embedder.embed([routing_text(request.body["messages"])]))
        return one, eligible(state.pool, one.requirements), placed

    return {
        "past of the conversation": (lambda request: request.body["messages"], inspect_history),
        "context, requirements too": (lambda request: request, context),
        "routing text": (lambda request: request.body["messages"], routing_text),
        "tokens of the text": (lambda request: routing_text(request.body["messages"]).encode(), tokenizer.ids),
        "embedding, tokens too": (lambda request: [routing_text(request.body["messages"])], embedder.embed),
        "clusters": (lambda request: embedder.embed([routing_text(request.body["messages"])]), cluster_map.assign),
        "eligibility": (context, lambda one: eligible(state.pool, one.requirements)),
        "scores": (left, lambda given: rank(given[1], given[2], given[0].requirements, given[0].params).chosen),
    }
