from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx

from tests.faults.gateway import CONFIGURED, TRANSLATED, a_gateway, counted, embedded_pid, journalled
from tests.support.command import ServeCommand
from tests.support.processes import children_of, owners_of
from tests.support.scripted_answers import Step
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.valkey import ValkeyServer, frozen
from tests.support.waiting import wait_until

DRAIN_S = 4


def words(count: int) -> Step:
    """Return a stream of so many words, ten a second."""
    return Step(message={"role": "assistant", "content": "word " * count}, drip_s=0.1)


def read_to_the_end(pieces: Iterator[bytes]) -> tuple[str, bool]:
    """Return what was read, and whether the connection ended as a response should."""
    seen = b""
    try:
        for piece in pieces:
            seen += piece
    except httpx.TransportError:
        return seen.decode(), False
    return seen.decode(), True


def test_a_worker_killed_in_a_stream_breaks_that_stream_only(
    tmp_path: Path, embedder_cache: Path, upstream: ScriptedUpstream
) -> None:
    with a_gateway(tmp_path, embedder_cache, upstream, "--workers", "2", translated=True) as gateway:
        for model in (CONFIGURED, TRANSLATED):
            workers = children_of(gateway.server.pid)
            with frozen(embedded_pid(gateway)):  # so that what the worker recorded is in its journal alone
                assert [gateway.ask(model).status_code for _ in range(20)] == [200] * 20
                upstream.then(words(300))
                with gateway.streaming(model) as answer:
                    pieces = answer.iter_raw()
                    assert b"data:" in next(pieces)
                    (killed,) = owners_of(answer, workers)
                    os.kill(killed, signal.SIGKILL)
                    text, ended_well = read_to_the_end(pieces)
                assert (ended_well, "[DONE]" in text) == (False, False)

            assert [gateway.ask(model).status_code for _ in range(10)] == [200] * 10
            assert wait_until(lambda killed=killed: len(set(children_of(gateway.server.pid)) - {killed}) == 2)
        with gateway.embedded_store() as client:
            assert wait_until(lambda: counted(client) == 60), counted(client)


def test_sigterm_drains_streams_cuts_the_late_ones_and_loses_no_record_without_redis(
    tmp_path: Path, embedder_cache: Path, upstream: ScriptedUpstream
) -> None:
    models = (CONFIGURED, TRANSLATED)
    upstream.history.clear()
    with ValkeyServer(tmp_path / "valkey") as valkey:
        environ = {"UNIROUTE_REDIS_URL": valkey.url}
        opened = a_gateway(tmp_path, embedder_cache, upstream, environ=environ, translated=True, drain_s=DRAIN_S)
        with opened as gateway:
            valkey.stop()
            with ExitStack() as streams, ThreadPoolExecutor() as asking:
                upstream.then(words(300), words(300), words(3), words(3), Step(delay_s=600), Step(delay_s=600))
                late = [streams.enter_context(gateway.streaming(model)) for model in models]
                short = [streams.enter_context(gateway.streaming(model)) for model in models]
                unanswered = [asking.submit(gateway.ask, model) for model in models]
                assert wait_until(lambda: len(upstream.history) == 6)
                signalled_at = time.monotonic()
                os.kill(gateway.server.pid, signal.SIGTERM)
                assert ["[DONE]" in stream.read().decode() for stream in short] == [True, True]
                for stream in late:
                    text, ended_well = read_to_the_end(stream.iter_raw())
                    last = json.loads(text.rstrip().rpartition("data: ")[2])
                    assert (ended_well, "[DONE]" in text, last["error"]["code"]) == (True, False, "shutting_down")
            for reply in unanswered:
                cut = reply.result()
                assert (cut.status_code, cut.json()["error"]["code"]) == (503, "shutting_down")
                assert int(cut.headers["retry-after"]) >= 1
            assert gateway.server.stop() == 0
            assert time.monotonic() - signalled_at >= DRAIN_S
            assert "Traceback" not in gateway.server.log
        endings = sorted(record["ending"] for record in journalled(gateway.data_dir))
        assert endings == ["complete"] * 2 + ["shutdown"] * 4

        valkey.start()
        again = ServeCommand(*gateway.server.arguments, environ=gateway.server.environ, log=tmp_path / "again.txt")
        with again, valkey.client() as client:
            assert wait_until(lambda: counted(client) == 6)
            assert wait_until(lambda: journalled(gateway.data_dir) == [])
