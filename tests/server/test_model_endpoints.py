"""What asks a model, where its endpoint fails or the server cannot serve: on our own connections and under ASGI."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from prometheus_client import generate_latest

from proxy.app import Application, app_state
from proxy.errors import ClientDisconnected, ModelAtCapacity, UpstreamError
from proxy.server.api.client_apis import CHAT, CLIENT_APIS, EMBEDDINGS, MESSAGES
from proxy.server.auth import RequestAuthorizer
from proxy.server.completions import Answer
from proxy.server.dependencies import AppState
from proxy.server.exchange import Exchange
from proxy.server.model_endpoints import ModelEndpoints
from proxy.server.startup import Startup
from proxy.settings.schema import Settings
from proxy.storage.client_keys import ClientKey
from tests.support.exchanges import Recording, served

pytestmark = [
    pytest.mark.filterwarnings("ignore:Item .* on TypedDict:UserWarning"),
    pytest.mark.asyncio(loop_scope="module"),  # they share one state
]

SECRET = "what went wrong inside"

# How a request with this URL is served: its path alone without ASGI, and one that few clients send under it.
WAYS = {"own": "", "ASGI": "?x=1"}


@pytest.fixture(scope="module", params=[CHAT.path, MESSAGES.path])
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("state")
    for table in embedder_cache.glob("static-*"):
        (folder / table.name).symlink_to(table)
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def state(data_dir: Path) -> AsyncIterator[AppState]:
    async with app_state(Settings.model_validate({"data_dir": data_dir}), {}) as opened:
        yield opened


Fail = Callable[[Exchange], Any]


def endpoints_of(state: AppState, path: str, fail: Fail) -> ModelEndpoints:
    async def endpoint(exchange: Exchange, app: AppState, key: ClientKey | None) -> Answer:
        result: Answer = await fail(exchange)
        return result

    authorizer = RequestAuthorizer(state.settings, lambda: state.snapshots.current)
    return ModelEndpoints({path: endpoint}, Startup(state), authorizer)


async def ask(state: AppState, path: str, fail: Fail) -> dict[str, httpx.Response | None]:
    """Ask both ways for what `fail` answers. None: the connection was closed."""
    endpoints = endpoints_of(state, path, fail)
    answers: dict[str, httpx.Response | None] = {}
    async with served(endpoints.serve, endpoints) as (host, port), httpx.AsyncClient(timeout=60) as client:
        for way, query in WAYS.items():
            try:
                answers[way] = await client.post(f"http://{host}:{port}{path}{query}", json={})
            except httpx.RemoteProtocolError:
                answers[way] = None
    return answers


def counted(state: AppState, status: int) -> float:
    """Return how many errors of this status the metrics show."""
    shown = generate_latest(state.metrics.registry).decode()
    found = re.search(rf'^uniroute_errors_total\{{status="{status}"\}} (.+)$', shown, re.MULTILINE)
    return float(found[1]) if found else 0.0


async def test_a_failure_of_ours_is_logged_and_answered_without_its_words(
    state: AppState, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(_: Exchange) -> Any:
        raise RuntimeError(SECRET)

    before = counted(state, 500)
    answers = await ask(state, path, fail)

    for answer in answers.values():
        assert answer is not None
        assert answer.status_code == 500
        assert SECRET not in answer.text
        assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
        assert answer.headers.get("request-id") == (answer.headers["x-request-id"] if path == MESSAGES.path else None)
    assert counted(state, 500) == before + len(WAYS)
    assert caplog.text.count(f"RuntimeError: {SECRET}") == len(WAYS)


async def test_a_failure_behind_the_head_of_an_answer_ends_the_connection(state: AppState, path: str) -> None:
    async def fail(exchange: Exchange) -> Any:
        await exchange.begin(200, {"content-type": "text/event-stream"})
        await exchange.write(b"data: {}\n\n")
        raise RuntimeError(SECRET)

    assert await ask(state, path, fail) == dict.fromkeys(WAYS)


async def test_an_answer_whose_headers_cannot_be_sent_is_an_error_of_ours(state: AppState) -> None:
    class Odd:
        async def send(self, exchange: Exchange) -> None:
            await exchange.send(200, {"x-uniroute-model": "\u6a21"}, b"{}")

    async def odd(_: Exchange) -> Any:
        return Odd()

    answers = await ask(state, CHAT.path, odd)

    assert [answer and answer.status_code for answer in answers.values()] == [500, 500]


@pytest.mark.parametrize(
    ("error", "status", "header"),
    [
        (UpstreamError("no answer"), 502, None),
        (UpstreamError("slow down", status=429, headers={"Retry-After": "7"}), 429, "7"),
        (ModelAtCapacity("busy", retry_after_s=0.4), 429, "1"),
        (ClientDisconnected("gone"), 499, None),
    ],
)
async def test_an_error_is_answered_alike_both_ways(
    state: AppState, path: str, error: Exception, status: int, header: str | None
) -> None:
    async def fail(_: Exchange) -> Any:
        raise error

    before = counted(state, status)
    answers = await ask(state, path, fail)

    own, other = answers.values()
    assert own is not None
    assert other is not None
    assert (own.status_code, own.headers.get("retry-after")) == (status, header)
    assert comparable(own) == comparable(other)
    assert counted(state, status) == before + len(WAYS)


def comparable(answer: httpx.Response) -> tuple[int, str, list[str]]:
    """Return the status, the body and the names of the headers, without the id of the request."""
    text = answer.text.replace(answer.headers["x-request-id"], "?")
    return answer.status_code, text, sorted(answer.headers)


@pytest.mark.parametrize("way", WAYS)
async def test_a_task_that_the_server_cancels_says_that_it_shuts_down(state: AppState, path: str, way: str) -> None:
    began = asyncio.Event()
    tasks: list[Any] = []

    async def wait(_: Exchange) -> Any:
        tasks.append(asyncio.current_task())
        began.set()
        await asyncio.Event().wait()

    endpoints = endpoints_of(state, path, wait)
    async with served(endpoints.serve, endpoints) as (host, port), httpx.AsyncClient(timeout=60) as client:
        asking = asyncio.create_task(client.post(f"http://{host}:{port}{path}{WAYS[way]}", json={}))
        await began.wait()
        tasks[0].cancel()
        answer = await asking

    assert answer.status_code == (529 if path == MESSAGES.path else 503)
    assert answer.headers["connection"] == "close"
    assert "shutting down" in answer.json()["error"]["message"]


@pytest.mark.parametrize("origins", [[], ["https://page.example"]])
async def test_a_starting_server_refuses_in_the_shape_of_each_api(tmp_path: Path, origins: list[str]) -> None:
    settings = Settings.model_validate({"data_dir": tmp_path, "allowed_origins": origins})
    app = Application(settings, Startup())
    assert (app.serve_exchange is None) == bool(origins)
    headers = {"origin": origins[0]} if origins else {}
    serve: Any = app.serve_exchange
    async with served(serve, app) as (host, port), httpx.AsyncClient(timeout=60, headers=headers) as client:
        for path in (*CLIENT_APIS, EMBEDDINGS):
            answer = await client.post(f"http://{host}:{port}{path}", content=b"{")
            assert answer.status_code == (529 if path == MESSAGES.path else 503)
            assert int(answer.headers["retry-after"]) >= 1
            assert json.loads(answer.text).get("type") == ("error" if path == MESSAGES.path else None)
            assert answer.headers.get("access-control-allow-origin") == (origins[0] if origins else None)


@pytest.mark.parametrize("way", WAYS)
async def test_a_connection_too_many_is_told_so_in_the_shape_of_its_api(
    state: AppState, path: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(_: Exchange) -> Any:
        raise AssertionError("it was let in")

    endpoints = endpoints_of(state, path, never)
    monkeypatch.setattr("proxy.server.protocol.max_connections", lambda: 0)
    async with served(endpoints.serve, endpoints) as (host, port), httpx.AsyncClient(timeout=60) as client:
        answer = await client.post(f"http://{host}:{port}{path}{WAYS[way]}", json={})
        assert len(Recording.opened) == 1

    assert (answer.status_code, answer.headers["connection"]) == (529 if path == MESSAGES.path else 503, "close")
    assert answer.headers["retry-after"] == "1"
    assert "no room" in answer.json()["error"]["message"]
