from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

from proxy.storage.redis import KEYS, MODELS, PROFILES
from tests.support.proxy_process import ProxyProcess, model_entry, uniform_profile
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.valkey import ValkeyServer
from tests.support.waiting import wait_until

MAX_TRIES = 20


class LossyProxy:
    """Stand between the proxy and Redis. While `lossy`, commands reach Redis and no answer to a script comes back."""

    def __init__(self, backend: int) -> None:
        self._backend = backend
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self.lossy = False
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(60)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop.close()

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._forward, "127.0.0.1", 0)

    async def _end(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._backend)
        sent = [b""]

        async def ask() -> None:
            while data := await reader.read(65536):
                sent[0] = data
                far_writer.write(data)
            far_writer.transport.abort()

        async def answer() -> None:
            while data := await far_reader.read(65536):
                if not (self.lossy and b"EVAL" in sent[0]):
                    writer.write(data)
            writer.transport.abort()

        try:
            await asyncio.gather(ask(), answer())
        finally:
            far_writer.transport.abort()
            writer.transport.abort()


@dataclass(frozen=True)
class Doubtful:
    proxy: ProxyProcess
    front: LossyProxy
    valkey: ValkeyServer
    upstream: ScriptedUpstream

    def lost(self, method: str, path: str, body: Any = None) -> str:
        """Make a change whose answer from Redis is lost, and return the response."""
        for _ in range(MAX_TRIES):
            assert wait_until(lambda: self.store() == "up")
            self.front.lossy = True
            try:
                reply = self.proxy.admin(method, path, body)
            finally:
                self.front.lossy = False
            assert wait_until(lambda: self.store() == "up")
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "unavailable")
            message = str(reply.json()["error"]["message"])
            if not message.startswith("could not read"):
                break  # else an answer to something else was lost before, and nothing was changed
        return message

    def store(self) -> str:
        return str(httpx.get(f"{self.proxy.url}/readyz", timeout=60).json()["store"])

    def repeated(self, method: str, path: str, body: Any = None) -> httpx.Response:
        replies: list[httpx.Response] = []

        def ask() -> bool:
            replies.append(self.proxy.admin(method, path, body))
            return replies[-1].status_code != 503

        assert wait_until(ask)
        return replies[-1]

    def stored(self, key: str) -> set[str]:
        with self.valkey.client() as client:
            return set(client.hkeys(key))


@pytest.fixture(scope="module")
def doubtful(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Doubtful]:
    folder = tmp_path_factory.mktemp("doubt")
    with ValkeyServer(folder / "valkey") as valkey, LossyProxy(valkey.port) as front, ScriptedUpstream() as upstream:
        environ = {"MODEL_API_KEY": "sk-x", "UNIROUTE_REDIS_URL": f"redis://127.0.0.1:{front.port}"}
        config = {"model_list": [model_entry("kept", upstream.url)], "uniroute": {"profile": {"on_start": False}}}
        with ProxyProcess(folder / "proxy", embedder_cache, config, environ) as proxy:
            yield Doubtful(proxy, front, valkey, upstream)


def test_a_model_is_stored_with_its_profile_or_not_at_all(doubtful: Doubtful) -> None:
    body = {**model_entry("profiled", doubtful.upstream.url), "profile": uniform_profile(0.1)}
    assert "may have been done all the same: GET /admin/models/profiled" in doubtful.lost("POST", "/admin/models", body)
    assert "profiled" in doubtful.stored(MODELS) & doubtful.stored(PROFILES)
    assert doubtful.repeated("POST", "/admin/models", body).status_code == 409
    assert doubtful.proxy.admin("GET", "/admin/models/profiled").json()["state"] == "ready"


def test_a_model_is_stored_with_the_job_that_measures_it_or_not_at_all(doubtful: Doubtful) -> None:
    body = {**model_entry("asked", doubtful.upstream.url), "profile": {"prompts": 24, "max_usd": 1.0}}
    assert "may have been done all the same" in doubtful.lost("POST", "/admin/models", body)

    def has_begun() -> bool:
        job = doubtful.proxy.admin("GET", "/admin/models/asked").json()["job"]  # None, too, while the store is away
        return job is not None and job["state"] != "queued"

    assert wait_until(has_begun)


def test_an_unconfirmed_new_key_is_named_in_the_error(doubtful: Doubtful) -> None:
    message = doubtful.lost("POST", "/admin/keys", {"name": "k"})
    found = re.search(r"lists the id (\w+), revoke it", message)
    assert found
    assert found[1] in doubtful.stored(KEYS)
    assert doubtful.repeated("DELETE", f"/admin/keys/{found[1]}").status_code == 204


def test_an_unconfirmed_rotation_can_be_repeated(doubtful: Doubtful) -> None:
    key = doubtful.repeated("POST", "/admin/keys", {"name": "k"}).json()
    assert "rotate it again" in doubtful.lost("POST", f"/admin/keys/{key['id']}/rotate")
    assert doubtful.repeated("POST", f"/admin/keys/{key['id']}/rotate").status_code == 200


def test_other_unconfirmed_changes_can_be_repeated(doubtful: Doubtful) -> None:
    price = {"input_cost_per_token": 2e-6, "output_cost_per_token": 2e-6}
    assert "repeat the request" in doubtful.lost("PUT", "/admin/models/kept/pricing", price)
    assert doubtful.repeated("PUT", "/admin/models/kept/pricing", price).status_code == 200
    gone = {**model_entry("gone", doubtful.upstream.url), "profile": uniform_profile(0.1)}
    doubtful.repeated("POST", "/admin/models", gone)
    assert "a 404 says that it was" in doubtful.lost("DELETE", "/admin/models/gone")
    assert doubtful.repeated("DELETE", "/admin/models/gone").status_code == 404
