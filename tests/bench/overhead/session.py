"""Run the bench: start and time every server alone, then all at once for interleaved rounds, then each alone again."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import product

from proxy.cli import console
from tests.bench.overhead.contenders import (
    API_OF_ROW,
    MESSAGES,
    PINNED,
    RESPONSES,
    ROUTED,
    TRANSLATED,
    Running,
    Server,
    profiled,
    running,
)
from tests.bench.overhead.processes import Memory, memory
from tests.bench.overhead.results import (
    DIRECT,
    HALF,
    HALF_STREAM,
    PACED,
    STREAM,
    Results,
    Start,
    Worked,
    at_once,
)
from tests.bench.overhead.rounds import Bench, Case, Row

CONNECTIONS = (1, 16, 64)
# After the first answer, until memory is looked at.
SETTLED_S = 1.0
# Open-loop case → the case that saturates.
RATES = {HALF: at_once(16), HALF_STREAM: STREAM}
# Bodies of other kinds have so much of the seconds, and are sent to one row of each way there is.
MIXED, OF_A_KIND = "mixed", 0.6
ONLY_MIXED = frozenset({PINNED, TRANSLATED, MESSAGES, RESPONSES})


@dataclass(frozen=True)
class Plan:
    rounds: int = 3
    seconds: float = 1.5
    kinds: Sequence[str] = ()
    """Of bodies, beside the mixed ones."""
    worked_requests: int = 20_000
    worked_s: float = 240.0
    """At most, for the slow."""

    @property
    def cases(self) -> list[Case]:
        return [
            *(Case(at_once(n), connections=n) for n in CONNECTIONS),
            Case(STREAM, stream=True),
            Case(PACED, stream=True, connections=64, pace_ms=5),
            Case(HALF),
            Case(HALF_STREAM, stream=True),
            *(Case(at_once(n, kind), kind, connections=n) for kind, n in product(self.kinds, (1, 16))),
        ]


def measured(plan: Plan, bench: Bench, servers: Sequence[Server]) -> Results:
    results = Results(
        rows=[DIRECT, *(row for server in servers for row in server.rows)],
    )
    for server in servers:
        if server.profiles:
            console.echo_err(f"preparing {name_of(server)}")
            with profiled(server, bench.cores.gateway):
                pass
    _time_starts(plan, bench, servers, results)
    with _all_running(bench, servers) as rows:
        _find_rates(bench, rows, results)
        for number in range(plan.rounds):
            _one_round(plan, bench, rows, results, number)
    for server in servers:
        _work(plan, bench, server, results)
    return results


def name_of(server: Server) -> str:
    return next(iter(server.rows))


def _time_starts(plan: Plan, bench: Bench, servers: Sequence[Server], results: Results) -> None:
    """Start each server alone, so that shared pages do not make its memory look smaller."""
    for number, server in product(range(plan.rounds), servers):
        console.echo_err(f"start {number + 1} of {plan.rounds}: {name_of(server)}")
        with running(server, bench.cores.gateway) as started:
            results.starts[name_of(server)].append(Start(started.ready_s, _settled_memory(started)))


def _settled_memory(started: Running) -> Memory:
    time.sleep(SETTLED_S)
    return memory(started.process.pid)


@contextmanager
def _all_running(bench: Bench, servers: Sequence[Server]) -> Iterator[list[Row]]:
    with ExitStack() as stack:
        rows = [Row(DIRECT, "bench", bench.upstream.port)]
        for server in servers:
            started = stack.enter_context(running(server, bench.cores.gateway))
            rows += rows_of(server, started)
        yield rows


def rows_of(server: Server, started: Running) -> list[Row]:
    pid = started.process.pid
    return [
        Row(name, model, server.port, pid, server.headers, API_OF_ROW.get(name, "chat"))
        for name, model in server.rows.items()
    ]


def _find_rates(bench: Bench, rows: Sequence[Row], results: Results) -> None:
    """Find the rates: half of what ours does at full load; for slower servers, half of that. Warms all of them up."""
    for case, saturating in RATES.items():
        most: dict[str, float] = {}
        for row in rows[1:]:
            console.echo_err(f"warming up, and how much it can: {row.name}, {saturating}")
            load = Case(saturating, stream=case == HALF_STREAM)
            bench.measure(load, row)
            most[row.name] = bench.measure(load, row).figures["per_s"]
        ours = most.get(ROUTED, math.inf)
        results.rates |= {(case, name): max(1.0, min(ours, mine) / 2) for name, mine in most.items()}


def _one_round(plan: Plan, bench: Bench, rows: Sequence[Row], results: Results, number: int) -> None:
    for case in plan.cases:
        console.echo_err(f"round {number + 1} of {plan.rounds}: {case.name}")
        for row in rows:
            if case.kind != MIXED and row.name in ONLY_MIXED:
                continue
            if case.name not in RATES:
                seconds = plan.seconds if case.kind == MIXED else plan.seconds * OF_A_KIND
                results.outcomes[case.name, row.name].append(bench.measure(case, row, seconds=seconds))
            elif row.name != DIRECT:
                paced = replace(case, rate=results.rates[case.name, row.name])
                results.beside[case.name, row.name].append(bench.measure(paced, rows[0]))
                results.outcomes[case.name, row.name].append(bench.measure(paced, row))


def _work(plan: Plan, bench: Bench, server: Server, results: Results) -> None:
    name, case = name_of(server), Case("for memory")
    console.echo_err(f"{plan.worked_requests:,} requests to {name}")
    with running(server, bench.cores.gateway) as started:
        row = rows_of(server, started)[0]
        outcome = bench.measure(case, row, seconds=plan.worked_s, most=plan.worked_requests)
        results.worked[name] = Worked(outcome.requests, _settled_memory(started))
    if outcome.failed:
        results.outcomes[case.name, name].append(outcome)
