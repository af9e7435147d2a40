"""What the proxy costs, on one core, beside others: `python -m tests.bench.overhead [--peers]`.

The gateway has one core to itself, load and upstream the other. Rounds are interleaved, so that what the machine does
meanwhile hits all alike; medians over rounds, in brackets the smallest and largest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from proxy.cli import console
from tests.bench.overhead.bodies import KINDS, write_bodies
from tests.bench.overhead.contenders import Contender, litellm_proxy, ours, portkey, sdk_floor
from tests.bench.overhead.load import Job
from tests.bench.overhead.processes import cpu_s, memory_mib
from tests.support.command import ROOT

LOAD_CORE = 1
CONNECTIONS = (1, 16, 64)


@dataclass(frozen=True)
class Case:
    """One column of the table."""

    title: str
    kind: str
    stream: bool
    connections: int
    rate: float = 0.0


@dataclass(frozen=True)
class Round:
    per_s: float
    chunks_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    first_p50_ms: float
    cpu_ms: float
    """Of the gateway, per request."""
    failed: int


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="uniroute-bench-") as name, ExitStack() as closing:
        folder = Path(name)
        upstream = closing.enter_context(Upstream())
        contenders = _contenders(arguments, folder, upstream, closing)
        cases = _cases(arguments)
        rounds: dict[tuple[str, str], list[Round]] = defaultdict(list)
        for number in range(arguments.rounds):
            for case in cases:
                for contender in contenders:
                    console.note(f"round {number + 1} of {arguments.rounds}: {case.title}, {contender.name}")
                    rounds[case.title, contender.name].append(_round(case, contender, folder, arguments.seconds))
        _print(cases, contenders, rounds)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each round and case")
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second of the open-loop case")
    parser.add_argument("--kinds", default="mixed", help=f"comma-separated: {', '.join(KINDS)}")
    parser.add_argument("--peers", type=Path, help="also LiteLLM's proxy and Portkey, installed in this folder")
    parser.add_argument("--only", default="", help="comma-separated parts of names of contenders")
    parser.add_argument(
        "--data-dir", type=lambda text: Path(text).absolute(), help="where an embedding table is already"
    )
    return parser.parse_args()


def _cases(arguments: argparse.Namespace) -> list[Case]:
    cases = []
    for kind in arguments.kinds.split(","):
        cases += [Case(f"{kind}, {n} at once", kind, False, n) for n in CONNECTIONS]
        cases.append(Case(f"{kind}, streamed, 16 at once", kind, True, 16))
        cases.append(Case(f"{kind}, {arguments.rate:g}/s", kind, False, 64, arguments.rate))
        cases.append(Case(f"{kind}, streamed, {arguments.rate:g}/s", kind, True, 64, arguments.rate))
    return cases


class Upstream:
    """The model server, on the load's core. Enters as its port."""

    def __enter__(self) -> int:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.overhead.upstream"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            preexec_fn=lambda: os.sched_setaffinity(0, {LOAD_CORE}),
        )
        assert self._process.stdout
        return int(self._process.stdout.readline())

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(10)


def _contenders(arguments: argparse.Namespace, folder: Path, upstream: int, closing: ExitStack) -> list[Contender]:
    table = arguments.data_dir
    openers: dict[str, Any] = {
        "ours, routed": ours("ours, routed", "auto", embedder_cache=table),
        "ours, pinned": ours("ours, pinned", "model-0", embedder_cache=table),
        "FastAPI + litellm SDK": sdk_floor,
    }
    if arguments.peers:
        openers |= {"LiteLLM proxy": litellm_proxy(arguments.peers), "Portkey": portkey(arguments.peers)}
    wanted = [name for name in openers if any(part in name for part in arguments.only.split(","))]
    contenders = [Contender("direct", upstream, 0, 0.0, "bench")]
    for name in wanted:
        place = folder / name.replace(" ", "-").replace(",", "")
        place.mkdir()
        console.note(f"starting {name}")
        contenders.append(closing.enter_context(openers[name](place, upstream)))
    return contenders


def _round(case: Case, contender: Contender, folder: Path, seconds: float) -> Round:
    file = folder / f"{case.kind}-{contender.model}-{case.stream}.jsonl"
    if not file.exists():
        write_bodies(file, case.kind, contender.model, stream=case.stream)
    job = Job(contender.port, str(file), case.connections, seconds, case.rate, dict(contender.headers))
    before = cpu_s(contender.pid) if contender.pid else 0.0
    measured = _load(job)
    spent = (cpu_s(contender.pid) if contender.pid else 0.0) - before
    times, first = sorted(measured["times_s"]), sorted(measured["first_s"])
    count = max(measured["requests"], 1)
    return Round(
        per_s=measured["requests"] / measured["seconds"],
        chunks_per_s=measured["events"] / measured["seconds"],
        p50_ms=_at(times, 0.50),
        p95_ms=_at(times, 0.95),
        p99_ms=_at(times, 0.99),
        first_p50_ms=_at(first, 0.50),
        cpu_ms=spent * 1000 / count,
        failed=measured["failed"],
    )


def _load(job: Job) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.overhead.load", json.dumps(asdict(job))],
        cwd=ROOT,
        capture_output=True,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {LOAD_CORE}),
    )
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] * 1000 if ordered else float("nan")


FIGURES: Sequence[tuple[str, Callable[[Round], float], str]] = (
    ("requests/s", lambda one: one.per_s, ",.0f"),
    ("chunks/s", lambda one: one.chunks_per_s, ",.0f"),
    ("p50 ms", lambda one: one.p50_ms, ".2f"),
    ("p95 ms", lambda one: one.p95_ms, ".2f"),
    ("p99 ms", lambda one: one.p99_ms, ".2f"),
    ("first p50 ms", lambda one: one.first_p50_ms, ".2f"),
    ("CPU ms", lambda one: one.cpu_ms, ".3f"),
)


def _print(cases: Sequence[Case], contenders: Sequence[Contender], rounds: dict[tuple[str, str], list[Round]]) -> None:
    for case in cases:
        rows = []
        for contender in contenders:
            seen = rounds[case.title, contender.name]
            failed = sum(one.failed for one in seen)
            rows.append(
                (contender.name, *(_spread([of(one) for one in seen], form) for _, of, form in FIGURES), str(failed))
            )
        console.table(("", *(name for name, _, _ in FIGURES), "failed"), rows, title=case.title)
    rows = [(c.name, f"{c.ready_s:.1f}", f"{memory_mib(c.pid):.0f}") for c in contenders if c.pid]
    console.table(("", "ready after s", "PSS MiB at the end"), rows)


def _spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


if __name__ == "__main__":
    main()
