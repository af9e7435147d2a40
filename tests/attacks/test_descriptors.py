from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from tests.attacks.conftest import ASK
from tests.support.command import ServeCommand, environment
from tests.support.proxy_process import model_entry
from tests.support.scripted_answers import Step
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until

DESCRIPTORS = 260
BODY = b'{"model":"fair","messages":[{"role":"user","content":"hi"}]}'
POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY


@pytest.fixture(scope="module")
def upstream() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream() as started:
        yield started


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path, upstream: ScriptedUpstream
) -> Iterator[ServeCommand]:
    folder = tmp_path_factory.mktemp("few")
    config = {"model_list": [model_entry("fair", upstream.url)], "uniroute": {"profile": {"on_start": False}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    environ = environment(folder / "data", embedder_cache, MODEL_API_KEY="sk-x")
    arguments = ("--config", folder / "config.yaml")
    with (
        ServeCommand(*arguments, environ=environ, log=folder / "log.txt", descriptors=DESCRIPTORS) as started,
        httpx.Client(base_url=started.url) as client,
    ):
        assert ask(client).status_code == 200  # whatever is opened at the first request is open now
        yield started


def ask(client: httpx.Client) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"model": "fair", "messages": ASK}, timeout=60)


def open_files(server: ServeCommand) -> int:
    return sum(1 for _ in Path(f"/proc/{server.pid}/fd").iterdir())


def answer(connection: socket.socket) -> bytes:
    """Return what was sent so far; b"closed" if nothing was and the connection is gone, b"open" if it is not."""
    connection.settimeout(60)
    try:
        return connection.recv(65536) or b"closed"
    except ConnectionError:
        return b"closed"
    except TimeoutError:
        return b"open"


def test_more_clients_than_descriptors_get_an_error_and_the_rest_are_served(
    server: ServeCommand, upstream: ScriptedUpstream
) -> None:
    before = open_files(server)
    url = httpx.URL(server.url)
    upstream.always = Step(hang=True)
    with ExitStack() as clients:
        held: list[socket.socket] = []
        for number in range(70):  # each holds a connection to us and one of ours to the model
            held.append(clients.enter_context(socket.create_connection((url.host, url.port or 80))))
            held[-1].sendall(POST)
            assert wait_until(lambda number=number: len(upstream.history) > number + 1)
        beyond = [clients.enter_context(socket.create_connection((url.host, url.port or 80))) for _ in range(300)]
        for connection in beyond:
            with suppress(ConnectionError):
                connection.sendall(POST)
        status_lines = {answer(connection).partition(b"\r\n")[0] for connection in beyond}
        assert status_lines == {b"HTTP/1.1 503 Service Unavailable", b"closed"}
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        refused = httpx.post(f"{server.url}/v1/chat/completions", json={"model": "fair", "messages": ASK})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["code"] == "too_many_connections"
        assert open_files(server) < DESCRIPTORS - 20
    upstream.always = None
    assert wait_until(lambda: open_files(server) <= before)
    with httpx.Client(base_url=server.url) as client:
        assert ask(client).status_code == 200
    assert "Traceback" not in server.log


def first_free_descriptor(server: ServeCommand) -> int:
    """The number that the next one gets, and the limit that forbids it: it bounds numbers, and they have gaps."""
    used = {int(each.name) for each in Path(f"/proc/{server.pid}/fd").iterdir()}
    return min(set(range(len(used) + 1)) - used)


def forbid_more_descriptors(server: ServeCommand) -> None:
    """Set the limit to the first free number, once no connection of an earlier request is about to be closed."""
    seen: list[int] = []

    def unchanged() -> bool:
        seen.append(first_free_descriptor(server))
        return len(seen) > 10 and len(set(seen[-10:])) == 1

    assert wait_until(unchanged)
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (seen[-1], DESCRIPTORS))


@dataclass(frozen=True)
class Exhausted:
    """What happened while the server could open nothing."""

    reply: httpx.Response
    answers: set[bytes]
    cpu_s: float
    probe: httpx.Response


def exhaust(server: ServeCommand, client: httpx.Client) -> Exhausted:
    """Ask for a model, connect 20 times and probe while the server may open nothing more."""
    with ExitStack() as closing:
        forbid_more_descriptors(server)
        limits = (DESCRIPTORS, DESCRIPTORS)
        closing.callback(resource.prlimit, server.pid, resource.RLIMIT_NOFILE, limits)
        reply = ask(client)
        used = cpu_s(server.pid)
        address = (client.base_url.host, client.base_url.port or 80)
        knocking = [closing.enter_context(socket.create_connection(address)) for _ in range(20)]
        answers = {answer(connection) for connection in knocking}
        time.sleep(0.5)
        return Exhausted(reply, answers, cpu_s(server.pid) - used, client.get("/healthz"))


def test_a_model_that_cannot_be_reached_for_want_of_descriptors_is_a_clear_502(
    server: ServeCommand, upstream: ScriptedUpstream
) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        assert ask(client).status_code == 200
        # libuv keeps one descriptor to turn connections away with. While it does so another thread of the server may
        # take that one; libuv has one again as soon as a connection is accepted.
        for _ in range(3):
            found = exhaust(server, client)
            if found.answers == {b"closed"}:
                break
            assert ask(client).status_code == 200
        again = ask(client)

    assert found.reply.status_code == 502, server.log[-6000:]
    assert "no file descriptor" in found.reply.json()["error"]["message"]
    assert found.answers == {b"closed"}
    assert found.cpu_s < 0.4, "accept went round and round"
    assert (found.probe.status_code, again.status_code) == (200, 200)


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
