from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from proxy.cli import console
from tests.bench.overhead.contenders import ROUTED
from tests.bench.overhead.results import (
    DIRECT,
    HALF,
    HALF_STREAM,
    PACED,
    STREAM,
    Column,
    Results,
    added,
    at_once,
    figure,
    median,
    rate,
    ratio,
    started,
    worked,
)

PER_S = Column("requests/s at 16", figure(at_once(16), "per_s"), ",.0f", more_is_better=True)
CPU = Column("CPU ms a request", figure(at_once(16), "cpu_ms"), ".3f")
ADDED_P50 = Column("added p50 ms", added(HALF, "p50_ms"), ".2f")
ADDED_P99 = Column("added p99 ms", added(HALF, "p99_ms"), ".2f")
CHUNKS_PER_S = Column("chunks/s", figure(STREAM, "chunks_per_s"), ",.0f", more_is_better=True)
CHUNK_US = Column("CPU µs a chunk", figure(STREAM, "chunk_us"), ".1f")
PACED_US = Column("µs a chunk, apart", figure(PACED, "chunk_us"), ".1f")
FIRST_P50 = Column("added first p50 ms", added(HALF_STREAM, "first_p50_ms"), ".2f")
READY = Column("ready after s", started(lambda start: start.ready_s), ".2f")
IDLE_PSS = Column("idle PSS MiB", started(lambda start: start.idle.pss), ".0f")
WORKED_PSS = Column("then PSS MiB", worked(lambda found: found.memory.pss), ".0f")

REQUESTS = (
    Column("requests/s at 1", figure(at_once(1), "per_s"), ",.0f", more_is_better=True),
    PER_S,
    Column("at 64", figure(at_once(64), "per_s"), ",.0f", more_is_better=True),
    Column("p50 ms at 1", figure(at_once(1), "p50_ms"), ".2f"),
    CPU,
)
LATENCY = (
    Column("requests/s", rate(HALF), ",.0f"),
    ADDED_P50,
    Column("added p95 ms", added(HALF, "p95_ms"), ".2f"),
    ADDED_P99,
    Column("CPU ms", figure(HALF, "cpu_ms"), ".3f"),
)
STREAMS = (CHUNKS_PER_S, CHUNK_US, PACED_US)
FIRST = (
    Column("streams/s", rate(HALF_STREAM), ",.0f"),
    FIRST_P50,
    Column("p95", added(HALF_STREAM, "first_p95_ms"), ".2f"),
    Column("p99", added(HALF_STREAM, "first_p99_ms"), ".2f"),
    Column("added to the last p50 ms", added(HALF_STREAM, "p50_ms"), ".2f"),
)
PROCESS = (
    READY,
    Column("idle RSS MiB", started(lambda start: start.idle.rss), ".0f"),
    IDLE_PSS,
    Column("requests", worked(lambda found: found.requests), ",.0f"),
    Column("then RSS MiB", worked(lambda found: found.memory.rss), ".0f"),
    WORKED_PSS,
)
# What the README shows, and what is compared.
SHORT = (PER_S, ADDED_P50, ADDED_P99, CPU, CHUNKS_PER_S, PACED_US, READY, IDLE_PSS, WORKED_PSS)


def print_report(results: Results, kinds: Sequence[str]) -> None:
    _table(results, REQUESTS, "Requests: mixed prompts up to 2 KB, all different")
    _table(results, LATENCY, "Added to the direct path at half the saturating rate, ours or a slower peer's own")
    _table(results, STREAMS, "Streams of 50 chunks: all CPU of a streamed request over its chunks")
    _table(results, FIRST, "Added until the first event, at half the saturating rate of streams")
    for kind in kinds:
        _table(results, _of_kind(kind), f"Bodies: {kind}")
    _table(
        results,
        PROCESS,
        "Processes, each alone: fresh, and after so many requests. What a server starts is counted",
    )
    _print_ratios(results)
    _print_ceiling(results)
    _print_trust(results)


def _of_kind(kind: str) -> Sequence[Column]:
    return (
        Column("requests/s at 16", figure(at_once(16, kind), "per_s"), ",.0f", more_is_better=True),
        Column("p50 ms at 1", figure(at_once(1, kind), "p50_ms"), ".2f"),
        Column("p99 ms at 1", figure(at_once(1, kind), "p99_ms"), ".2f"),
        Column("CPU ms", figure(at_once(16, kind), "cpu_ms"), ".3f"),
    )


def _table(results: Results, columns: Sequence[Column], title: str) -> None:
    rows = [(row, *(spread(column.of(results, row), column.form) for column in columns)) for row in results.rows]
    filled = [cells for cells in rows if any(cells[1:])]
    if filled:
        console.table(("", *(column.title for column in columns)), filled, title=f"\n{title}")


def spread(values: Sequence[float], form: str) -> str:
    """Format the spread; empty if nothing was measured."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return ""
    middle = f"{median(known):{form}}"
    return middle if len(known) == 1 else f"{middle} [{min(known):{form}}, {max(known):{form}}]"


def _print_ratios(results: Results) -> None:
    """Print the ratios. Nothing is compared with itself, and the direct path is no gateway."""
    others = [row for row in results.rows if row not in (DIRECT, ROUTED)]
    rows = [(row, *(_times(ratio(results, column, row)) for column in SHORT)) for row in others]
    if rows and ROUTED in results.rows:
        columns = ("better than", *(column.title for column in SHORT))
        console.table(columns, rows, title=f"\n{ROUTED}: so many times as good as the others of this run")


def _times(value: float) -> str:
    return "" if math.isnan(value) else f"×{value:.3g}"


def _print_ceiling(results: Results) -> None:
    requests, chunks = (median(column.of(results, DIRECT)) for column in (PER_S, CHUNKS_PER_S))
    console.echo(f"\nCeiling: without a gateway {requests:,.0f} requests/s and {chunks:,.0f} chunks/s")
    plain, streamed = results.upstream_alone(at_once(16), "per_s"), results.upstream_alone(STREAM, "chunks_per_s")
    console.echo("  (load and upstream on one core, every event a write of its own; the upstream alone, by its CPU,")
    console.echo(f"  {plain:,.0f} requests/s and {streamed:,.0f} chunks/s)")


def _print_trust(results: Results) -> None:
    usual, most = results.disturbance()
    console.echo(f"Others took {usual:.0%} of the gateway's core while it was measured, {most:.0%} in the worst round")
    for doubt in results.doubts():
        console.echo(f"DOUBT: {doubt}")
    for failure in results.failures():
        console.echo(f"FAILED: {failure}")


def markdown(results: Results) -> str:
    """Return the short table: medians alone, and failures if there are any."""
    header = ["", *(column.title for column in SHORT)]
    lines = ["| " + " | ".join(header) + " |", "|---" + "|--:" * len(SHORT) + "|"]
    for row in results.rows:
        values = [median(column.of(results, row)) for column in SHORT]
        cells = ["" if math.isnan(v) else f"{v:{c.form}}" for v, c in zip(values, SHORT, strict=True)]
        lines.append("| " + " | ".join([row, *cells]) + " |")
    return "\n".join([*lines, *(f"\nFAILED: {failure}" for failure in results.failures())]) + "\n"


def as_json(results: Results) -> Mapping[str, Any]:
    """Return every figure of every round."""
    return {
        "about": results.about,
        "rows": list(results.rows),
        "rates": [{"case": case, "row": row, "per_s": value} for (case, row), value in results.rates.items()],
        "rounds": [_rounds(*key, outcomes) for key, outcomes in results.outcomes.items()],
        "direct_at_the_same_rate": [_rounds(*key, outcomes) for key, outcomes in results.beside.items()],
        "starts": {name: [asdict(start) for start in found] for name, found in results.starts.items()},
        "after_requests": {name: asdict(found) for name, found in results.worked.items()},
        "doubts": results.doubts(),
        "failures": results.failures(),
    }


def _rounds(case: str, row: str, outcomes: Sequence[Any]) -> Mapping[str, Any]:
    known = [{name: _known(value) for name, value in outcome.figures.items()} for outcome in outcomes]
    return {"case": case, "row": row, "failed": sum(outcome.failed for outcome in outcomes), "figures": known}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
