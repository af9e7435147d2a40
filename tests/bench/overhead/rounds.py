from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.overhead.bodies import LoadAPI, kind_of, write_requests
from tests.bench.overhead.compiled import Upstream, run
from tests.bench.overhead.load import Job, Measured
from tests.bench.overhead.processes import core_busy_s, cpu_s
from tests.bench.overhead.upstream import CHUNKS

# By name: per_s, chunks_per_s, cpu_ms, chunk_us, p50_ms, first_p50_ms…; NaN where nothing was measured.
Figures = Mapping[str, float]
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Cores:
    gateway: int
    load: int


@dataclass(frozen=True)
class Case:
    """Describe a load. `rate`: requests a second whatever is answered; else each connection sends after each answer."""

    name: str
    kind: str = "mixed"
    stream: bool = False
    connections: int = 16
    rate: float = 0.0
    pace_ms: int = 0


@dataclass(frozen=True)
class Row:
    """Describe a line of the tables: a server, or the upstream itself, and the model that is requested."""

    name: str
    model: str
    port: int
    pid: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    api: LoadAPI = "chat"


@dataclass(frozen=True)
class Outcome:
    figures: Figures
    requests: int
    failed: int
    why: str


@dataclass
class Bench:
    """Run rounds. Each gets texts of its own: `_seed` moves on by more than one can use."""

    folder: Path
    cores: Cores
    upstream: Upstream
    seconds: float
    _seed: int = 0

    def measure(self, case: Case, row: Row, *, seconds: float | None = None, most: int = 0) -> Outcome:
        job = self.job(case, row, seconds=seconds, most=most)
        before = self._spent(row)
        measured, load_cpu_s = run(job, self.cores.load)
        wall, gateway, upstream, core = (b - a for a, b in zip(before, self._spent(row), strict=True))
        figures = {
            **latencies(measured),
            **rates(measured, case, gateway),
            "gateway_core": gateway / wall,
            "upstream_core": upstream / wall,
            "load_core": (load_cpu_s + upstream) / wall,
            "others": (core - gateway) / wall,
        }
        return Outcome(figures, measured.requests, measured.failed, _why(measured))

    def job(self, case: Case, row: Row, *, seconds: float | None = None, most: int = 0) -> Job:
        self._seed += 10_000_000
        return Job(
            row.port,
            str(self._requests(case, row)),
            case.connections,
            seconds or self.seconds,
            warm_s=0.0 if most else 0.3,
            rate=case.rate,
            most=most,
            fewest_events=CHUNKS if case.stream else 0,
            seed=self._seed,
        )

    def _spent(self, row: Row) -> tuple[float, float, float, float]:
        gateway = cpu_s(row.pid) if row.pid else math.nan
        return time.monotonic(), gateway, self.upstream.cpu_s, core_busy_s(self.cores.gateway)

    def _requests(self, case: Case, row: Row) -> Path:
        words = (case.kind, row.name, case.stream, case.pace_ms)
        path = self.folder / "-".join(str(word).replace(" ", "_") for word in words)
        if not path.exists():
            kind = kind_of(case.kind)
            write_requests(
                path, kind, row.model, stream=case.stream, pace_ms=case.pace_ms, headers=row.headers, api=row.api
            )
        return path


def latencies(measured: Measured) -> dict[str, float]:
    found: dict[str, float] = {}
    for prefix, times in (("", measured.times_s), ("first_", measured.first_s)):
        ordered = sorted(times)
        found |= {f"{prefix}p{share}_ms": _at(ordered, share / 100) for share in PERCENTILES}
    return found


def rates(measured: Measured, case: Case, gateway_s: float) -> dict[str, float]:
    """Return rates. A stream counts for its fifty chunks, however many events a gateway makes of them."""
    per_s = measured.counted / measured.seconds
    cpu_ms = gateway_s * 1000 / measured.requests if measured.requests else math.nan
    found = {"per_s": per_s, "cpu_ms": cpu_ms}
    return found | ({"chunks_per_s": per_s * CHUNKS, "chunk_us": cpu_ms * 1000 / CHUNKS} if case.stream else {})


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] * 1000 if ordered else math.nan


def _why(measured: Measured) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in measured.reasons.items())
    return f"{reasons}; the first: {measured.sample!r}" if measured.failed else ""
