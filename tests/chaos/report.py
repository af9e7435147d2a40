from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from proxy.cli import console
from tests.chaos.accounting import Account, Evidence
from tests.chaos.administrator import Administrator
from tests.chaos.behaviours import BEHAVIOURS
from tests.chaos.clients import CLIENTS
from tests.chaos.faults import KINDS, Fault
from tests.chaos.outcomes import ACCOUNTED
from tests.chaos.watch import Watch

Row = tuple[str, ...]
MAX_PRINTED = 40


@dataclass(frozen=True)
class Run:
    seed: int
    seconds: float
    evidence: Evidence
    account: Account
    faults: Sequence[Fault]
    watch: Watch
    administrator: Administrator
    problems: Sequence[str]
    """The account's, and those of processes and of the log."""


def print_report(run: Run) -> None:
    requests = len(run.evidence.outcomes)
    console.table(*_of_clients(run), title=f"seed {run.seed}: {requests:,} requests in {run.seconds:.0f} s")
    console.table(*_of_upstreams(run), title="what upstreams did, and what the clients of those requests saw")
    console.table(*_of_faults(run), title="what was done to processes")
    console.table(("", "picodollars"), list(_spend(run)), title="spend")
    for name, fact in _facts(run):
        console.echo(f"{name}: {fact}")
    for problem in run.problems[:MAX_PRINTED]:
        console.echo(f"WRONG: {problem}")
    if len(run.problems) > MAX_PRINTED:
        console.echo(f"… and {len(run.problems) - MAX_PRINTED} more")
    console.echo(f"{len(run.problems)} discrepancies")


def _of_clients(run: Run) -> tuple[Row, list[Row]]:
    counted = Counter((outcome.client, outcome.ending) for outcome in run.evidence.outcomes)
    endings = [*ACCOUNTED, *sorted({ending for _, ending in counted} - set(ACCOUNTED))]
    rows = [(client, *(_count(counted[client, ending]) for ending in endings)) for client in CLIENTS]
    sums = Counter(outcome.ending for outcome in run.evidence.outcomes)
    return ("client", *endings), [*rows, ("all", *(_count(sums[ending]) for ending in endings))]


def _of_upstreams(run: Run) -> tuple[Row, list[Row]]:
    endings = {outcome.question.id: outcome.ending for outcome in run.evidence.outcomes}
    requests: Counter[str] = Counter()
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for attempt in run.evidence.attempts:
        requests[attempt.behaviour] += 1
        seen[attempt.behaviour][endings.get(attempt.question, "?")] += 1
    rows = [
        (behaviour.name, _count(requests[behaviour.name]), *(_count(seen[behaviour.name][e]) for e in ACCOUNTED))
        for behaviour in BEHAVIOURS
    ]
    return ("upstream", "times", *ACCOUNTED), rows


def _of_faults(run: Run) -> tuple[Row, list[Row]]:
    rows = []
    for kind in KINDS:
        times = [fault for fault in run.faults if fault.kind == kind]
        lasted = sum(fault.ended - fault.began for fault in times)
        hit = {
            outcome.question.id: outcome.ending
            for outcome in run.evidence.outcomes
            if any(outcome.started < fault.ended and fault.began < outcome.ended for fault in times)
        }
        ends = Counter(hit.values())
        rows.append((kind, _count(len(times)), f"{lasted:.1f}", *(_count(ends[ending]) for ending in ACCOUNTED)))
    return ("fault", "times", "seconds", *(f"{ending} meanwhile" for ending in ACCOUNTED)), rows


def _spend(run: Run) -> Iterator[Row]:
    account = run.account
    yield "complete, on record", f"{account.complete_pico:,}"
    yield "complete, in the upstreams' ledgers", f"{account.ledger_pico:,}"
    yield "complete without usage, estimated", f"{account.estimated_pico:,}"
    yield "complete without usage, at most", f"{account.estimated_bound_pico:,}"
    yield "broken off, estimated", f"{account.aborted_pico:,}"
    yield "broken off, at most", f"{account.aborted_bound_pico:,}"


def _facts(run: Run) -> Iterator[Row]:
    watch, administrator = run.watch, run.administrator
    yield "records", ", ".join(f"{ending} {count:,}" for ending, count in sorted(run.account.endings.items()))
    yield "complete records of answers without usage", _count(run.account.estimated)
    yield "/healthz", f"{watch.probes:,} asked, {len(watch.failed)} failed, longest wait {watch.longest_s:.2f} s"
    for sent_at, lasted in watch.slow:
        meanwhile = {fault.kind for fault in run.faults if fault.began < sent_at + lasted and sent_at < fault.ended + 1}
        yield "  a slow one", f"{lasted:.2f} s, meanwhile {', '.join(sorted(meanwhile)) or 'nothing'}"
    yield "longest that the run itself was held up", f"{watch.longest_own_s:.2f} s"
    yield "worker processes seen", str(len(watch.seen))
    yield "admin calls", ", ".join(f"{call} {count}" for call, count in sorted(administrator.answers.items()))
    yield "longest admin call", f"{administrator.longest_s:.2f} s"
    waits = sorted(outcome.ended - outcome.started for outcome in run.evidence.outcomes)
    if waits:
        yield "requests", f"median {waits[len(waits) // 2]:.2f} s, longest {waits[-1]:.2f} s"


def _count(number: int) -> str:
    return f"{number:,}" if number else "-"
