from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench.growth import OF_REQUESTS, Point, too_fast
from tests.bench.overhead.bodies import PLACEHOLDER, kind_of, short, write_requests
from tests.bench.overhead.compiled import LOAD, UPSTREAM, Upstream, program, run
from tests.bench.overhead.contenders import PINNED, ROUTED
from tests.bench.overhead.load import Job
from tests.bench.overhead.processes import Memory
from tests.bench.overhead.report import READY, markdown
from tests.bench.overhead.results import HALF, Results, Start, ratio
from tests.bench.overhead.rounds import Outcome
from tests.support.program import ROOT

CORE = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
PYTHON = {name: program(name, compiler=None) for name in (LOAD, UPSTREAM)}
COMPILED = {name: program(name) for name in (LOAD, UPSTREAM)}
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the bench pins processes to cores")


def a_job(folder: Path, port: int, *, stream: bool = False, pace_ms: int = 0, **more: object) -> Job:
    path = write_requests(folder / "requests", kind_of("short"), "bench", stream=stream, pace_ms=pace_ms)
    values: dict[str, object] = {"connections": 2, "seconds": 30.0, "warm_s": 0.0, "most": 20, **more}
    return Job(port, str(path), fewest_events=50 if stream else 0, **values)  # type: ignore[arg-type]


@pytest.fixture(params=[COMPILED, PYTHON], ids=["compiled", "Python"])
def load(request: pytest.FixtureRequest) -> tuple[str, ...]:
    found: tuple[str, ...] = request.param[LOAD]
    return found


@pytest.fixture(params=[COMPILED, PYTHON], ids=["to compiled", "to Python"])
def upstream(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Upstream]:
    with Upstream(tmp_path, CORE, request.param[UPSTREAM]) as started:
        yield started


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_every_answer_is_counted_whole_by_either_program(
    load: tuple[str, ...], upstream: Upstream, tmp_path: Path, stream: bool
) -> None:
    measured, _ = run(a_job(tmp_path, upstream.port, stream=stream), CORE, load)

    assert (measured.failed, measured.reasons) == (0, {})
    assert measured.counted == measured.requests == len(measured.times_s) >= 20
    assert measured.events == (54 * measured.counted if stream else 0)


def test_a_paced_stream_takes_its_time(load: tuple[str, ...], upstream: Upstream, tmp_path: Path) -> None:
    job = a_job(tmp_path, upstream.port, stream=True, pace_ms=2, most=1, connections=1)

    measured, _ = run(job, CORE, load)

    assert measured.counted == 1
    assert measured.times_s[0] > 53 * 0.002 > measured.first_s[0]


@contextlib.contextmanager
def answering(answer: bytes, received: list[bytes] | None = None) -> Iterator[int]:
    """Answer whatever comes with the same bytes, in two pieces, and close."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection:
                    request = connection.recv(65536)
                    if received is not None and request:
                        received.append(request)
                    connection.sendall(answer[:-7])
                    connection.sendall(answer[-7:])

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def chunked(*pieces: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


EVENTS = b'data: {"choices": []}\n\n' * 50
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("answer", "reasons"),
    [
        (chunked(EVENTS, DONE), {}),
        (chunked(EVENTS[:-17], EVENTS[-17:] + b"da", b"ta: [DONE]\n\n"), {}),
        (b"HTTP/1.1 200 OK\r\n\r\n" + EVENTS + DONE, {}),
        (chunked(EVENTS), {"too few events": 1}),
        (chunked(EVENTS[:200], DONE), {"too few events": 1}),
        (chunked(EVENTS, DONE)[:-5], {"broken off": 1}),
        (b"HTTP/1.1 500 No\r\nconnection: close\r\ncontent-length: 12\r\n\r\ndata: [DONE]", {"status": 1}),
    ],
    ids=["whole", "cut anywhere", "ended by closing", "no [DONE]", "events missing", "no last chunk", "an error"],
)
def test_a_stream_fails_that_is_not_whole(
    load: tuple[str, ...], tmp_path: Path, answer: bytes, reasons: dict[str, int]
) -> None:
    with answering(answer) as port:
        measured, _ = run(a_job(tmp_path, port, stream=True, most=1, connections=1), CORE, load)

    assert (measured.reasons, measured.failed) == (reasons, len(reasons))
    assert "broken off" in reasons or bool(measured.sample) == bool(reasons)


def test_no_two_requests_are_alike_though_one_is_sent_again_and_again(load: tuple[str, ...], tmp_path: Path) -> None:
    path = write_requests(tmp_path / "one", (short, 1), "bench", stream=True)
    received: list[bytes] = []

    with answering(chunked(EVENTS, DONE), received) as port:
        run(Job(port, str(path), 1, 30.0, warm_s=0.0, most=20, fewest_events=50), CORE, load)

    assert len({*received}) == len(received) == 20
    assert PLACEHOLDER.encode() not in b"".join(received)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_prints_a_row_for_each_contender_and_nothing_fails(embedder_cache: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    command = [sys.executable, "-m", "tests.bench.overhead", "--quick", "--rounds", "1", "--seconds", "0.2"]
    more = ["--requests", "50", "--kinds", "", "--json", "--table", str(embedder_cache), "--markdown", str(table)]
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("the bench needs two cores")

    done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["failures"] == []
    assert document["rows"][:3] == ["direct", ROUTED, PINNED]
    lines = table.read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == document["rows"]
    assert all(document["starts"][ROUTED][0]["idle"][size] > 0 for size in ("rss", "pss"))


def results(failed: int = 0, upstream_core: float = 0.1) -> Results:
    made = Results(rows=["direct", ROUTED, "other"])
    made.starts[ROUTED].append(Start(2.0, Memory(100.0, 80.0)))
    made.starts["other"].append(Start(8.0, Memory(300.0, 280.0)))
    figures = {
        "per_s": 1.0,
        "p50_ms": 1.0,
        "p99_ms": 2.0,
        "load_core": 0.95,
        "upstream_core": upstream_core,
        "others": 0.0,
    }
    made.beside[HALF, "other"].append(Outcome(figures, 10, 0, ""))
    made.outcomes[HALF, "other"].append(Outcome(figures, 10, failed, "3 status" if failed else ""))
    return made


def test_what_failed_is_said_in_every_report() -> None:
    assert results().failures() == []
    assert results(failed=3).failures() == ["other, half the saturating rate: 3 of 10 requests failed: 3 status"]
    assert "FAILED" in markdown(results(failed=3))
    assert "FAILED" not in markdown(results())


def test_what_may_be_the_limit_instead_of_the_gateway_is_said() -> None:
    busy = "other, half the saturating rate: load and upstream used 95% of their core; they may be the limit"

    assert results().doubts() == [busy]
    assert results(upstream_core=0.5).doubts() == [
        "other, half the saturating rate: the upstream is only 2.0 times as fast",
        busy,
    ]


def test_a_ratio_says_how_many_times_as_good_ours_is() -> None:
    assert ratio(results(), READY, "other") == 4.0


def test_a_figure_that_grows_faster_than_its_cause_is_named() -> None:
    def point(cause: float, *values: float) -> Point:
        return Point("", cause, dict(zip((figure.title for figure in OF_REQUESTS), values, strict=True)))

    before = point(10, 500.0, 1_000.0)

    assert too_fast(before, point(20, 1_000.0, 500.0), OF_REQUESTS) == []
    assert too_fast(before, point(20, 1_500.0, 500.0), OF_REQUESTS) == ["CPU µs a request"]
    assert too_fast(before, point(20, 500.0, 300.0), OF_REQUESTS) == ["requests/s at 16"]
