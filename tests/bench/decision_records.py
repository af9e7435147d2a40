"""Print what the record of a decision costs a request: `python -m tests.bench.decision_records`.

Microseconds of CPU, the best of several rounds: to build its text beside what a request did before, to write the longer
line to the journal, and to read it back for the batch that goes to Redis.
"""

from __future__ import annotations

import os
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from proxy.routing.selection import Selection
from proxy.server.request_log import Costs, baseline_of, decision_detail
from proxy.storage.decisions import AttemptRecord
from proxy.storage.usage import TokenCounts, UsageRecord, cost_usd
from proxy.storage.usage_journal import JournalDirectory
from proxy.storage.usage_writer import BatchTotals
from router_core.eligibility import eligible
from router_core.scoring import ScoringParams, rank
from router_core.types import Requirements
from tests.bench.request_parts import a_routing_state

ROUNDS, CALLS = 7, 3000
ATTEMPTS = [AttemptRecord("model-0", 0.0005, "complete", None, 1.5)]


class Context:
    """What the record reads of a request."""

    def __init__(self, models: int) -> None:
        self.snapshot = a_routing_state(models)
        self.key, self.api, self.received_at, self.translation = None, "chat", time.monotonic(), None
        self.ids = self.request = self.app = self.settings = self
        self.request_id, self.model, self.log_prompts = "req-" + "0" * 32, "auto", False


def a_selection(ctx: Context, allowed: int | None) -> Selection:
    cluster_map, pool = ctx.snapshot.cluster_map, ctx.snapshot.pool
    vector = np.random.default_rng(0).normal(size=(1, cluster_map.centroids.shape[1])).astype(np.float32)
    placed = cluster_map.assign(vector / np.linalg.norm(vector))
    wanted = Requirements(prompt_tokens=100)
    left = eligible(pool, wanted, None if allowed is None else set(pool.names[:allowed]))
    decision = rank(left, placed, wanted, ScoringParams())
    return Selection("dec-" + "0" * 32, decision.chosen, "scored", 0.1, decision.ranking, decision, {})


def best_us(call: Callable[[], object]) -> float:
    return min(timeit.repeat(call, number=CALLS, repeat=ROUNDS, timer=time.process_time)) / CALLS * 1e6


def lines(folder: Path) -> Iterator[str]:
    columns = ("models", "allowed", "build", "baseline", "journal", "batch", "sum", "bytes")
    yield " ".join(f"{name:>8}" for name in columns)
    for models, allowed in ((2, None), (10, None), (100, None), (100, 5)):
        yield row(folder, models, allowed)


def row(folder: Path, models: int, allowed: int | None) -> str:
    ctx: Any = Context(models)
    selection = a_selection(ctx, allowed)
    costs = Costs(0.001, 0.0, "model-1", 0.002)
    usage = UsageRecord(selection.id, 1.8e9, "model-0", None, "scored", "complete", 10, 0, 5, 0, 0.001, 1.5, 0.5)
    detail = decision_detail(ctx, selection, ATTEMPTS, costs)
    short, whole = usage.to_json(), f'{usage.to_json()[:-1]},"detail":{detail}}}'
    price = ctx.snapshot.prices["model-1"].price
    journals = JournalDirectory(folder / f"{models}-{allowed}", 10**10)
    parts = (
        best_us(lambda: decision_detail(ctx, selection, ATTEMPTS, costs)),
        best_us(lambda: (baseline_of(ctx), cost_usd(TokenCounts(10, 0, 5, 0), price))),
        best_us(lambda: journals.append(whole)) - best_us(lambda: journals.append(short)),
        best_us(lambda: _read(whole)) - best_us(lambda: _read(short)),
    )
    journals.close()
    shown = " ".join(f"{part:8.1f}" for part in (*parts, sum(parts)))
    return f"{models:8} {allowed or 'all':>8} {shown} {len(detail):8}"


def _read(text: str) -> None:
    BatchTotals(keep_decisions=True).add_line(text, orjson.loads(text))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as made:
        for line in lines(Path(made)):
            print(line)  # noqa: T201
