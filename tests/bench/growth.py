"""Measure how cost grows with models, clusters, bodies and streams, and without Redis: `python -m tests.bench.growth`.

Each row has its ratio to the one before in brackets. A figure that grew faster than its cause is named. The server has
one core, load and upstream another. Seconds are short, so read trends. Linux, two cores, ten minutes.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import redis

from proxy.cli import console
from proxy.concurrency import raise_open_files_limit
from proxy.storage.valkey import socket_path
from router_core.embedding import static_embedder
from tests.bench.open_streams import FORMS, with_open_streams
from tests.bench.overhead.__main__ import two_cores
from tests.bench.overhead.compiled import Upstream
from tests.bench.overhead.contenders import ROUTED, ours, profiled
from tests.bench.overhead.processes import memory
from tests.bench.overhead.results import median
from tests.bench.overhead.rounds import Bench, Case, Row
from tests.bench.overhead.session import rows_of
from tests.bench.prompts import write_prompts
from tests.conftest import CACHE
from tests.support.command import environment, run_command
from tests.support.valkey import frozen

MODELS = (2, 20, 200, 1_000)
CLUSTERS = (16, 64, 256, 1_024)
BODIES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
STREAMS = (1, 10, 100, 1_000, 2_000)
PARTS = ("models", "clusters", "bodies", "redis", "streams")
# That maps are fitted on, generated.
PROMPTS = 20_000
ROUNDS = 3
# Answers on each of sixteen connections that a round lasts for at least.
TURNS = 2
# Times its cause that a figure may grow before it is said to grow faster.
NOISE = 1.25


@dataclass(frozen=True)
class Figure:
    title: str
    form: str
    less_is_better: bool = True


@dataclass(frozen=True)
class Point:
    """Hold one row. `cause` is the number that grows; it is the same in two rows where nothing should change."""

    name: str
    cause: float
    values: Mapping[str, float]


OF_REQUESTS = (
    Figure("p50 ms at 1", ".2f"),
    Figure("requests/s at 16", ",.0f", less_is_better=False),
    Figure("CPU ms", ".3f"),
)


@dataclass
class Growing:
    bench: Bench
    table: Path
    scale: float
    failed: int = 0

    @contextmanager
    def served(self, name: str, **config: Any) -> Iterator[Row]:
        console.echo_err(f"starting {name}")
        folder, url = self.bench.folder / name.replace(" ", "-"), self.bench.upstream.url
        server = ours(folder, url, {ROUTED: "auto"}, embedder_cache=self.table, **config)
        with profiled(server, self.bench.cores.gateway) as started:
            yield rows_of(server, started)[0]

    def point(self, name: str, cause: float, row: Row, kind: str = "mixed") -> Point:
        """Return medians of a few short rounds."""
        found: dict[str, list[float]] = {figure.title: [] for figure in OF_REQUESTS}
        for number in range(ROUNDS + 1):
            alone = self.bench.measure(Case("alone", kind, connections=1), row)
            long_enough = max(self.bench.seconds, TURNS * alone.figures["p50_ms"] * 16 / 1000)
            many = self.bench.measure(Case("many", kind), row, seconds=long_enough)
            self.failed += alone.failed + many.failed
            if number:  # the first warms up
                measured = (alone.figures["p50_ms"], many.figures["per_s"], many.figures["cpu_ms"])
                for figure, value in zip(OF_REQUESTS, measured, strict=True):
                    found[figure.title].append(value)
        return Point(name, cause, {title: median(values) for title, values in found.items()})


def over_models(growing: Growing) -> Iterator[Point]:
    for count in scaled(MODELS, growing.scale):
        with growing.served(f"{count} models", models=count) as row:
            yield growing.point(f"{count:,} models", count, row)


def over_clusters(growing: Growing) -> Iterator[Point]:
    folder = growing.bench.folder
    write_prompts(folder / "prompts.jsonl", PROMPTS)
    environ = environment(folder / "fitting", growing.table)
    for count in scaled(CLUSTERS, growing.scale):
        fitted = folder / f"map-{count}"
        done = run_command(
            "fit", folder / "prompts.jsonl", "--out", fitted, "--clusters", str(count), environ=environ, timeout_s=300
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        with growing.served(f"{count} clusters", cluster_map=fitted) as row:
            yield growing.point(f"K = {count:,}", count, row)


def over_bodies(growing: Growing) -> Iterator[Point]:
    with growing.served("bodies", max_body_bytes=4 * max(BODIES)) as row:
        for size in scaled(BODIES, growing.scale):
            yield growing.point(f"{size:,} characters", size, row, kind=str(size))


def without_redis(growing: Growing) -> Iterator[Point]:
    """Stop the embedded store as a process that hangs is stopped: the worst way to be away."""
    with growing.served("store") as row:
        yield growing.point("the store answers", 1, row)
        with frozen(_store_pid(growing.bench.folder / "store" / "data")):
            yield growing.point("the store hangs", 1, row)


def over_streams(growing: Growing) -> Iterator[Point]:
    with growing.served("streams") as row:
        growing.point("warming up", 0, row)
        alone = memory(row.pid).pss
        for count in scaled(STREAMS, growing.scale):
            seen = with_open_streams(growing.bench, row, count, alone)
            growing.failed += seen.failed
            yield Point(f"{seen.open:,} open streams", seen.open, seen.figures)


def scaled(values: Sequence[int], scale: float) -> list[int]:
    """Keep the numbers up to a share of the largest."""
    return [value for value in values if value <= scale * max(values)] or [min(values)]


def _store_pid(data_dir: Path) -> int:
    with redis.Redis(unix_socket_path=str(socket_path(data_dir / "valkey"))) as client:
        info: Any = client.info("server")
    return int(info["process_id"])


Part = tuple[Callable[[Growing], Iterator[Point]], Sequence[Figure]]
STREAM_FIGURES = tuple(Figure(title, form) for title, form in FORMS.items())
WORK: Mapping[str, Part] = {
    "models": (over_models, OF_REQUESTS),
    "clusters": (over_clusters, OF_REQUESTS),
    "bodies": (over_bodies, OF_REQUESTS),
    "redis": (without_redis, OF_REQUESTS),
    "streams": (over_streams, STREAM_FIGURES),
}


def growth(before: Point, after: Point, figure: Figure) -> float:
    """Return the factor by which a cost rose; for a rate, by which it fell."""
    then, now = before.values[figure.title], after.values[figure.title]
    if math.isnan(then) or math.isnan(now) or min(then, now) <= 0:
        return math.nan
    return now / then if figure.less_is_better else then / now


def too_fast(before: Point, after: Point, figures: Sequence[Figure]) -> list[str]:
    """Return the titles of figures that grew faster than their cause."""
    allowed = NOISE * after.cause / before.cause
    return [figure.title for figure in figures if growth(before, after, figure) > allowed]


def print_part(name: str, points: Sequence[Point], figures: Sequence[Figure]) -> list[str]:
    """Print a part, and return what grew too fast, row by row."""
    rows, found = [], []
    for before, point in pairwise([None, *points]):
        assert point
        cells = [_cell(before, point, figure) for figure in figures]
        flagged = too_fast(before, point, figures) if before else []
        found += [f"{point.name}: {title} grew faster than its cause" for title in flagged]
        rows.append((point.name, *cells, ", ".join(flagged)))
    console.table(("", *(figure.title for figure in figures), "faster than its cause"), rows, title=f"\n{name}")
    return found


def _cell(before: Point | None, point: Point, figure: Figure) -> str:
    value = f"{point.values[figure.title]:{figure.form}}"
    grown = growth(before, point, figure) if before else math.nan
    return value if math.isnan(grown) else f"{value} (×{grown:.2f})"


def main() -> None:
    arguments = _arguments()
    raise_open_files_limit()
    static_embedder(arguments.table, console.echo_err)
    found: list[str] = []
    with tempfile.TemporaryDirectory(prefix="uniroute-growth-") as name:
        cores = two_cores()
        with Upstream(Path(name), cores.load) as upstream:
            growing = Growing(Bench(Path(name), cores, upstream, arguments.seconds), arguments.table, arguments.scale)
            for part in arguments.parts.split(","):
                work, figures = WORK[part]
                found += print_part(part, list(work(growing)), figures)
    for line in found:
        console.echo(f"GROWS: {line}")
    if growing.failed:
        console.echo(f"FAILED: {growing.failed:,} requests")
    sys.exit(1 if growing.failed else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"comma-separated: {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=0.7, help="of each round; a row has eight")
    parser.add_argument("--scale", type=float, default=1.0, help="largest row as a share of the largest there is")
    parser.add_argument("--table", type=Path, default=CACHE, help="where the embedding table is, or is made")
    arguments = parser.parse_args()
    arguments.table = arguments.table.absolute()
    if unknown := [part for part in arguments.parts.split(",") if part not in WORK]:
        raise SystemExit(f"--parts: there is no {unknown[0]!r}; there are {', '.join(PARTS)}")
    return arguments


if __name__ == "__main__":
    main()
