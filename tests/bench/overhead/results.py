from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.bench.overhead.contenders import ROUTED
from tests.bench.overhead.processes import Memory
from tests.bench.overhead.rounds import Outcome

DIRECT = "direct"
HALF, HALF_STREAM = "half the saturating rate", "half the saturating rate, streamed"
STREAM, PACED = "streamed, 16 at once", "streamed, 64 at once, an event per 5 ms"
# Times as fast as a gateway must the upstream be, by the CPU that it takes, or it is a part of what is measured.
ENOUGH = 5.0
# Of the load's core: from here on the generator may be the limit.
BUSY = 0.9


@dataclass(frozen=True)
class Start:
    ready_s: float
    idle: Memory


@dataclass(frozen=True)
class Worked:
    """Hold the memory after so many requests, alone on the machine, from a fresh start."""

    requests: int
    memory: Memory


@dataclass
class Results:
    rows: Sequence[str]
    """Names, the direct one first."""
    outcomes: dict[tuple[str, str], list[Outcome]] = field(default_factory=lambda: defaultdict(list))
    """By case and row, one per round."""
    beside: dict[tuple[str, str], list[Outcome]] = field(default_factory=lambda: defaultdict(list))
    """The direct path at that row's rate, just before it."""
    starts: dict[str, list[Start]] = field(default_factory=lambda: defaultdict(list))
    """By the first row of a server, as is `worked`."""
    worked: dict[str, Worked] = field(default_factory=dict)
    rates: dict[tuple[str, str], float] = field(default_factory=dict)
    about: dict[str, object] = field(default_factory=dict)
    """The machine, the versions, the command."""

    def series(self, case: str, row: str, figure: str) -> list[float]:
        return [outcome.figures.get(figure, math.nan) for outcome in self.outcomes.get((case, row), [])]

    def added(self, case: str, row: str, figure: str) -> list[float]:
        """Return what was added to the direct path, round by round."""
        beside = [outcome.figures[figure] for outcome in self.beside.get((case, row), [])]
        return [mine - direct for mine, direct in zip(self.series(case, row, figure), beside, strict=True)]

    def failures(self) -> list[str]:
        found = []
        for (case, row), outcomes in [*self.outcomes.items(), *self.beside.items()]:
            failed, requests = sum(o.failed for o in outcomes), sum(o.requests for o in outcomes)
            if failed:
                why = next(outcome.why for outcome in outcomes if outcome.failed)
                found.append(f"{row}, {case}: {failed:,} of {requests:,} requests failed: {why}")
        return found

    def doubts(self) -> list[str]:
        """Return where something else than the gateway may have been measured."""
        found = []
        for (case, row), outcomes in self.outcomes.items():
            load, upstream = (median([o.figures[core] for o in outcomes]) for core in ("load_core", "upstream_core"))
            if row != DIRECT and upstream > 1 / ENOUGH:
                found.append(f"{row}, {case}: the upstream is only {1 / upstream:.1f} times as fast")
            if row != DIRECT and load > BUSY:
                found.append(f"{row}, {case}: load and upstream used {load:.0%} of their core; they may be the limit")
        return found

    def upstream_alone(self, case: str, figure: str) -> float:
        """Estimate the upstream's rate with its core for itself, by the CPU that it took."""
        rates, shares = self.series(case, DIRECT, figure), self.series(case, DIRECT, "upstream_core")
        return median([rate / share for rate, share in zip(rates, shares, strict=True) if share])

    def disturbance(self) -> tuple[float, float]:
        """Return what others took of the gateway's core during measurements: median and most, as shares."""
        shares = [o.figures["others"] for (_, row), found in self.outcomes.items() if row != DIRECT for o in found]
        return (median(shares), max(shares)) if shares else (math.nan, math.nan)


@dataclass(frozen=True)
class Column:
    title: str
    of: Callable[[Results, str], Sequence[float]]
    """A row's value in each round."""
    form: str
    more_is_better: bool = False


def figure(case: str, name: str) -> Callable[[Results, str], Sequence[float]]:
    return lambda results, row: results.series(case, row, name)


def added(case: str, name: str) -> Callable[[Results, str], Sequence[float]]:
    return lambda results, row: results.added(case, row, name)


def rate(case: str) -> Callable[[Results, str], Sequence[float]]:
    return lambda results, row: [results.rates[case, row]] if (case, row) in results.rates else []


def started(of: Callable[[Start], float]) -> Callable[[Results, str], Sequence[float]]:
    return lambda results, row: [of(start) for start in results.starts.get(row, [])]


def worked(of: Callable[[Worked], float]) -> Callable[[Results, str], Sequence[float]]:
    def value(results: Results, row: str) -> Sequence[float]:
        found = results.worked.get(row)
        return [of(found)] if found else []

    return value


def at_once(connections: int, kind: str = "mixed") -> str:
    return f"{kind}, {connections} at once"


def median(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


def ratio(results: Results, column: Column, row: str, base: str = ROUTED) -> float:
    """Return how many times better `base` is than `row`: of medians of the same run."""
    mine, other = median(column.of(results, base)), median(column.of(results, row))
    if math.isnan(mine) or math.isnan(other) or min(mine, other) <= 0:
        return math.nan
    return mine / other if column.more_is_better else other / mine
