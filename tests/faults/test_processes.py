"""A worker killed in the middle of a stream, and an orderly end while streams are open and Redis is away."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.faults.gateway import CONFIGURED, a_gateway, counted, embedded_pid, journalled
from tests.support.answers import Step
from tests.support.command import ServeCommand
from tests.support.process_group import children_of
from tests.support.upstream import ScriptedUpstream, wait_until
from tests.support.valkey import OwnValkey, frozen

DRAIN_S = 2
BOTH_WAYS = pytest.mark.parametrize("forward", ["relay", "translate"])


@pytest.fixture
def upstream() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream(lambda _: "42") as started:
        yield started


def words(count: int) -> Step:
    """A stream of so many words, ten a second."""
    return Step(message={"role": "assistant", "content": "word " * count}, drip_s=0.1)


def read_to_the_end(pieces: Iterator[bytes]) -> tuple[str, bool]:
    """What came, and whether the connection ended as a response should."""
    seen = b""
    try:
        for piece in pieces:
            seen += piece
    except httpx.TransportError:
        return seen.decode(), False
    return seen.decode(), True


def serving(answer: httpx.Response, pids: list[int]) -> int:
    """Which of the processes has this connection."""
    client_port = answer.extensions["network_stream"].get_extra_info("client_addr")[1]
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    sockets = {f"socket:[{row[9]}]" for row in rows if int(row[2].split(":")[1], 16) == client_port}
    (found,) = [pid for pid in pids if sockets & {str(file.readlink()) for file in Path(f"/proc/{pid}/fd").iterdir()}]
    return found


@BOTH_WAYS
def test_a_worker_killed_in_a_stream_breaks_that_stream_alone(
    tmp_path: Path, embedder_cache: Path, upstream: ScriptedUpstream, forward: str
) -> None:
    with a_gateway(tmp_path, embedder_cache, upstream, "--workers", "2", forward=forward) as gateway:
        workers = children_of(gateway.server.pid)
        with frozen(embedded_pid(gateway)):  # so that what the worker recorded is in its journal alone
            assert [gateway.ask(CONFIGURED).status_code for _ in range(20)] == [200] * 20
            upstream.then(words(300))
            with gateway.streaming() as answer:
                pieces = answer.iter_raw()
                assert b"data:" in next(pieces)
                killed = serving(answer, workers)
                os.kill(killed, signal.SIGKILL)
                text, ended_well = read_to_the_end(pieces)
            assert (ended_well, "[DONE]" in text) == (False, False)

        assert [gateway.ask(CONFIGURED).status_code for _ in range(10)] == [200] * 10
        assert wait_until(lambda: len(set(children_of(gateway.server.pid)) - {killed}) == 2, 20)
        with gateway.embedded_store() as client:
            assert wait_until(lambda: counted(client) == 30, 20), counted(client)


@BOTH_WAYS
def test_sigterm_lets_streams_end_cuts_the_late_and_loses_no_record_while_redis_is_away(
    tmp_path: Path, embedder_cache: Path, upstream: ScriptedUpstream, forward: str
) -> None:
    with OwnValkey(tmp_path / "valkey") as valkey:
        environ = {"UNIROUTE_REDIS_URL": valkey.url}
        opened = a_gateway(tmp_path, embedder_cache, upstream, environ=environ, forward=forward, drain_s=DRAIN_S)
        with opened as gateway:
            valkey.stop()
            upstream.then(words(5), words(300), Step(delay_s=60))
            with gateway.streaming() as short, gateway.streaming() as long, ThreadPoolExecutor() as asking:
                whole = asking.submit(gateway.ask, CONFIGURED)
                assert wait_until(lambda: len(upstream.history) == 3, 20)
                told = time.monotonic()
                os.kill(gateway.server.pid, signal.SIGTERM)
                assert "[DONE]" in short.read().decode()
                text, ended_well = read_to_the_end(long.iter_raw())
            last = json.loads(text.rstrip().rpartition("data: ")[2])
            assert (ended_well, "[DONE]" in text, last["error"]["code"]) == (True, False, "shutting_down")
            cut = whole.result()
            assert (cut.status_code, cut.json()["error"]["code"]) == (503, "shutting_down")
            assert int(cut.headers["retry-after"]) >= 1
            assert gateway.server.stop() == 0
            assert DRAIN_S <= time.monotonic() - told < DRAIN_S + 10
            assert "Traceback" not in gateway.server.log
        assert sorted(record["ending"] for record in journalled(gateway.data_dir)) == ["complete", *["shutdown"] * 2]

        valkey.start()
        again = ServeCommand(*gateway.server.arguments, environ=gateway.server.environ, log=tmp_path / "again.txt")
        with again, valkey.client() as client:
            assert wait_until(lambda: counted(client) == 3, 10)
            assert wait_until(lambda: journalled(gateway.data_dir) == [], 10)
