from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tests.bench.overhead.compiled import begun
from tests.bench.overhead.processes import cpu_s, memory
from tests.bench.overhead.rounds import Bench, Case, Row
from tests.chaos.processes import tcp_connections

# Between two events of a stream, which would last for almost two minutes.
PACE_MS = 2_000
FORMS = {
    "PSS MiB": ",.0f",
    "KiB a stream": ",.0f",
    "p50 ms beside": ".2f",
    "p99 ms beside": ".2f",
    "CPU µs beside": ",.0f",
    "requests/s beside at 16": ",.0f",
    "CPU % of the streams": ".1f",
}
OPEN_S, POLL_S, SETTLED_S = 40.0, 0.1, 1.0
# Streams below which other things weigh more than they.
FEW = 100


@dataclass(frozen=True)
class Seen:
    open: int
    """Fewer than were asked for where the server cannot open so many within `OPEN_S`."""
    figures: Mapping[str, float]
    failed: int


def with_open_streams(bench: Bench, row: Row, count: int, alone_mib: float) -> Seen:
    """Measure with open streams. `alone_mib`: the server's size before any stream."""
    case = Case("held open", "short", stream=True, connections=count, pace_ms=PACE_MS)
    idle = _open(row, bench)
    with begun(bench.job(case, row, seconds=600, most=count), bench.cores.load):
        _until(lambda: _open(row, bench) >= count)
        time.sleep(SETTLED_S)
        size, spent, began = memory(row.pid).pss, cpu_s(row.pid), time.monotonic()
        time.sleep(2 * PACE_MS / 1000)
        busy = (cpu_s(row.pid) - spent) / (time.monotonic() - began)
        beside = bench.measure(Case("beside", connections=1), row, seconds=1.5)
        many = bench.measure(Case("many beside"), row, seconds=1.5)
        reached = min(count, _open(row, bench))
    _until(lambda: _open(row, bench) <= idle)
    each = (size - alone_mib) * 1024 / reached if reached >= FEW else math.nan
    # The streams go on meanwhile.
    own_us = 1e3 * many.figures["cpu_ms"] * (1 - busy / many.figures["gateway_core"])
    latencies = (beside.figures["p50_ms"], beside.figures["p99_ms"])
    values = (size, each, *latencies, own_us, many.figures["per_s"], 100 * busy)
    return Seen(reached, dict(zip(FORMS, values, strict=True)), beside.failed + many.failed)


def _open(row: Row, bench: Bench) -> int:
    """Count connections to the upstream; up to sixteen may be idle."""
    return sum(remote == bench.upstream.port for _, remote in tcp_connections(row.pid))


def _until(reached: Callable[[], bool]) -> None:
    """Wait for at most `OPEN_S`."""
    deadline = time.monotonic() + OPEN_S
    while not reached() and time.monotonic() < deadline:
        time.sleep(POLL_S)
