"""What streams cost that are merely open: memory of each, and a plain request beside them. Starts no server."""

from __future__ import annotations

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor

from tests.bench.overhead.processes import cpu_s, memory
from tests.bench.overhead.rounds import Bench, Case, Outcome, Row
from tests.chaos.processes import tcp_connections

PACE_MS = 400
"""Between two events of a stream, which lasts twenty seconds then."""
FIGURES = {"PSS MiB": ",.0f", "KiB a stream": ",.0f", "p50 ms beside": ".2f", "p99 ms beside": ".2f", "CPU %": ".0f"}
OPEN_S, POLL_S = 15.0, 0.1


def with_open_streams(bench: Bench, row: Row, count: int) -> tuple[list[float], int]:
    """`FIGURES`, and how many requests failed. KiB are NaN of fewer than a hundred: other things weigh more."""
    before = memory(row.pid).pss
    held = Case("held open", "short", stream=True, connections=count, pace_ms=PACE_MS)
    with ThreadPoolExecutor(1) as pool:
        streams = pool.submit(bench.measure, held, row, seconds=60.0, most=count)
        reached = _until_open(row, bench.upstream.port, count, streams)
        now, spent, began = memory(row.pid).pss, cpu_s(row.pid), time.monotonic()
        time.sleep(1.0)
        busy = (cpu_s(row.pid) - spent) / (time.monotonic() - began)
        beside = bench.measure(Case("beside", connections=1), row, seconds=1.5)
        if streams.done():
            raise SystemExit(
                f"only {reached} of {count} streams were open at once: the first ended before the last began"
            )
        ended = streams.result()
    each = (now - before) * 1024 / count if count >= 100 else math.nan
    figures = [now, each, beside.figures["p50_ms"], beside.figures["p99_ms"], 100 * busy]
    return figures, beside.failed + ended.failed


def _until_open(row: Row, upstream: int, count: int, streams: Future[Outcome]) -> int:
    """How many there are once all are, or no more come."""
    deadline, found = time.monotonic() + OPEN_S, 0
    while time.monotonic() < deadline and not streams.done():
        found = sum(remote == upstream for _, remote in tcp_connections(row.pid))
        if found >= count:
            break
        time.sleep(POLL_S)
    return found
