"""Do one chaos run: `python -m tests.chaos.run --seed 7 --seconds 300`. Exits 1 where anything is not accounted for.

Two workers of `uniroute serve` over a real Valkey and two upstreams that keep their own ledgers; clients of all kinds;
and faults, drawn from the seed, in upstreams, processes and the store. Afterwards all are compared. The timing of
the machine is not in the seed: the same seed gives the same questions and faults, not the same interleaving.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

from proxy.cli import console
from router_core.embedding import static_embedder
from tests.chaos.accounting import Evidence, account, near_a_kill
from tests.chaos.administrator import Administrator
from tests.chaos.clients import ClientPool
from tests.chaos.faults import Faults
from tests.chaos.outcomes import COMPLETE, EMPTY
from tests.chaos.report import Run, print_report
from tests.chaos.traffic import Traffic
from tests.chaos.watch import Watch, serving_workers
from tests.chaos.world import WORKERS, World, a_world
from tests.support.reaper import Reaper

RECORDED_S = 20.0
# Of all requests: with less, the run would say nothing.
MIN_COMPLETE = 1 / 3


async def chaos(folder: Path, embedder_cache: Path, seed: int, seconds: float, per_second: float) -> Run:
    with a_world(folder, embedder_cache, seed) as world:
        await serving_workers(world)
        watch = Watch(world)
        watching = asyncio.gather(watch.run(), watch.watch_ourselves())
        faults, administrator = Faults(world, Random(f"{seed}/faults")), Administrator(world, Random(f"{seed}/admin"))
        started = time.monotonic()
        async with ClientPool.open(world.server.url) as pool:
            traffic = Traffic(pool, world.keys, Random(f"{seed}/traffic"), per_second)
            until = started + seconds
            await asyncio.gather(traffic.run(until), faults.run(until), administrator.run(until))
        lasted = time.monotonic() - started
        serving = await serving_workers(world)
        await administrator.check()
        await _recorded(world, traffic)
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        problems = list(_of_processes(world, watch, faults, serving))
        status = await asyncio.to_thread(world.server.stop)
        problems += [f"the server ended with status {status}"] if status != 0 else []
        found = _evidence(world, traffic, faults)
        problems += [*_of_the_log(world), *administrator.problems, *_of_health(watch, administrator, faults)]
        account_of_run = account(found)
        problems += [*account_of_run.problems, *_of_use(found)]
        return Run(seed, lasted, found, account_of_run, faults.happened, watch, administrator, problems)


async def _recorded(world: World, traffic: Traffic) -> None:
    """Wait until what clients saw complete is stored, or the time is up: accounting says what is missing."""
    seen = {outcome.decision for outcome in traffic.outcomes if outcome.ending in (COMPLETE, EMPTY)}
    deadline = time.monotonic() + RECORDED_S
    while time.monotonic() < deadline:
        records = await asyncio.to_thread(world.records)
        if seen <= {record["decision"] for record in records}:
            return
        await asyncio.sleep(0.5)


def _evidence(world: World, traffic: Traffic, faults: Faults) -> Evidence:
    return Evidence(
        outcomes=traffic.outcomes,
        attempts=world.attempts(),
        records=world.records(),
        logged=world.logged(),
        totals=world.totals(),
        kills=faults.kills,
    )


def _of_processes(world: World, watch: Watch, faults: Faults, serving: int) -> Iterator[str]:
    if serving != WORKERS:
        yield f"{serving} of {WORKERS} workers answer at the end"
    if world.server.process is None or world.server.process.poll() is not None:
        yield "the server has ended"
        return
    gone = watch.seen - {pid for pid in watch.seen if Path(f"/proc/{pid}").exists()} - set(faults.killed)
    yield from (f"the worker {pid} ended without being killed" for pid in sorted(gone))
    for process in (world.store, *world.upstreams):
        if not process.alive:
            yield f"a process of the run itself has ended: {process.pid}"


def _of_health(watch: Watch, administrator: Administrator, faults: Faults) -> Iterator[str]:
    """Check that a call got no answer only where a worker was just killed."""
    for call, spans in (("/healthz", watch.failed), ("an admin call", administrator.dropped)):
        for span in spans:
            if not near_a_kill(span, faults.kills):
                yield f"{call} got no answer for {span[1] - span[0]:.1f} s, though no worker was killed"


def _of_the_log(world: World) -> Iterator[str]:
    log = world.server.log
    for part in log.split("Traceback (most recent call last)")[1:]:
        last = next((line for line in part.splitlines()[1:] if line and not line.startswith((" ", "\t"))), "")
        yield f"a traceback in the log: {last[:200]}"


def _of_use(evidence: Evidence) -> Iterator[str]:
    complete = sum(outcome.ending == COMPLETE for outcome in evidence.outcomes)
    if complete < MIN_COMPLETE * len(evidence.outcomes):
        yield f"only {complete} of {len(evidence.outcomes)} requests were answered whole: the run says little"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--per-second", type=float, default=25, help="requests that are asked each second, at most")
    parser.add_argument("--data-dir", type=Path, help="where an embedding table is already")
    parser.add_argument("--keep", type=Path, help="a new folder for logs and ledgers, kept afterwards")
    arguments = parser.parse_args()
    if sys.platform == "linux":
        Reaper()
    with tempfile.TemporaryDirectory(prefix="uniroute-chaos-") as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        cache = arguments.data_dir or Path(temporary)
        static_embedder(cache, console.echo_err)
        run = asyncio.run(chaos(folder, cache, arguments.seed, arguments.seconds, arguments.per_second))
    print_report(run)
    sys.exit(1 if run.problems else 0)


if __name__ == "__main__":
    main()
