"""Measure starts and memory of `uniroute serve`: `python -m tests.bench.startup` (Linux).

A start is timed from the command to the first 200 of /readyz and to the first routed answer. Its CPU seconds are those
of all its processes until then; they depend less on what else the machine does. Memory is the proportional size (PSS)
of each process, a while after that answer.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from proxy.cli import console
from router_core.distill import TABLE
from router_core.embedding import static_embedder
from tests.bench.overhead.contenders import ROUTED, Server, answers, is_ready, ours, profiled
from tests.bench.overhead.processes import cpu_s, memory_of_one, started, tree, until_it_answers
from tests.bench.overhead.session import SETTLED_S
from tests.support.program import ROOT
from tests.support.scripted_upstream import ScriptedUpstream

ROWS = {ROUTED: "auto"}
SERVES = "serves"
# What a process is by a part of its command line; the first that fits.
ROLES = {
    "valkey_watch": "ends the store with the server",
    "valkey-server": "embedded store",
    "resource_tracker": "multiprocessing's resource tracker",
    "multiprocessing.forkserver": "what workers are forked from",
    "proxy.cli": "supervisor",
}


@dataclass(frozen=True)
class Start:
    ready_s: float
    answered_s: float
    cpu_s: float
    """Until the first answer, of all processes."""
    pss: Mapping[str, float]
    """MiB by process."""
    table: Sequence[tuple[float, float]]
    """Resident and private MiB of the embedding table, in each process that maps it."""
    has_torch: bool

    @property
    def worker_pss(self) -> float:
        """Return that of the largest process that routes."""
        return max(size for name, size in self.pss.items() if name.startswith(SERVES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--first", action="store_true", help="also time first starts, which make the embedding table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="uniroute-bench-") as name, ScriptedUpstream() as upstream:
        folder, rows = Path(name), []
        if options.first:
            first = [
                a_start(ours(folder / f"first-{run}", upstream.url, ROWS, default_model="model-0"))
                for run in range(options.runs)
            ]
            rows.append(row("first, 1 worker", first))
        static_embedder(folder / "table")
        for workers in options.workers:
            server = ours(folder / f"{workers}", upstream.url, ROWS, embedder_cache=folder / "table", workers=workers)
            with profiled(server):
                pass
            taken = [a_start(server) for _ in range(options.runs)]
            rows.append(row(f"warm, {workers} worker{'s'[: workers - 1]}", taken))
            show_memory(workers, taken[-1])
    head = ("start", "ready s", "first routed answer s", "CPU s", "PSS of a worker MiB", "of all MiB", "torch")
    loads = " ".join(f"{load:.1f}" for load in os.getloadavg())
    console.table(head, rows, title=f"medians of {options.runs} (and all), load {loads} on {os.cpu_count()} cores")


def row(name: str, taken: Sequence[Start]) -> tuple[str, ...]:
    return (
        name,
        spread([start.ready_s for start in taken]),
        spread([start.answered_s for start in taken]),
        spread([start.cpu_s for start in taken]),
        f"{statistics.median(start.worker_pss for start in taken):.0f}",
        f"{statistics.median(sum(start.pss.values()) for start in taken):.0f}",
        "imported" if any(start.has_torch for start in taken) else "no",
    )


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def show_memory(workers: int, start: Start) -> None:
    console.table(("process", "PSS MiB"), [(name, f"{size:.1f}") for name, size in start.pss.items()])
    for resident, private in start.table:
        console.echo(f"{TABLE}: {resident:.1f} MiB resident, {private:.1f} private ({workers} workers)")


def a_start(server: Server) -> Start:
    began = time.monotonic()
    with started(server.command, environ=server.environ, log=server.log, cwd=ROOT) as process:
        until_it_answers(lambda: is_ready(server), process, server.log)
        ready_s = time.monotonic() - began
        until_it_answers(lambda: answers(server), process, server.log)
        answered_s, used_s = time.monotonic() - began, cpu_s(process.pid)
        time.sleep(SETTLED_S)
        pids = tree(process.pid)
        maps = {pid: Path(f"/proc/{pid}/smaps").read_text() for pid in pids}
        return Start(
            ready_s,
            answered_s,
            used_s,
            {f"{role(maps[pid], pid)}, {pid}": memory_of_one(pid).pss for pid in pids},
            [table for text in maps.values() if (table := mapped_table(text))],
            any("libtorch" in text for text in maps.values()),
        )


def role(maps: str, pid: int) -> str:
    if TABLE in maps:
        return SERVES
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return next((name for part, name in ROLES.items() if any(part in word for word in words)), " ".join(words)[:60])


def mapped_table(maps: str) -> tuple[float, float] | None:
    """Return the resident and the private MiB of the embedding table in a process's smaps; None if it has none."""
    _, found, rest = maps.partition(f"/{TABLE}\n")
    if not found:
        return None
    kib = dict(re.findall(r"^(\w+): +(\d+) kB$", rest.partition("VmFlags")[0], re.MULTILINE))
    return int(kib["Rss"]) / 1024, (int(kib["Private_Clean"]) + int(kib["Private_Dirty"])) / 1024


if __name__ == "__main__":
    main()
