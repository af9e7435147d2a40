"""Measure µs of CPU of each stage from the socket to the chosen model: `python -m tests.bench.request_stages`.

Drives the real ASGI app in process, over a connection whose transport drops everything. The upstream answers at once
and notes when it was asked. The first rows of a table are that whole path; the others its stages by themselves. Each
figure is the median over bodies, all of them different, of the fastest of a few rounds. No Redis is asked.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from typing import Any

import uvloop

from proxy.cli import console
from proxy.routing.chat_request import parse_chat
from proxy.routing.selection import select_model
from proxy.routing.selection_context import SelectionContext
from proxy.server.dependencies import AppState
from router_core.embedding import static_embedder
from tests.bench.overhead.bodies import KINDS
from tests.bench.prompts import generated_prompts
from tests.bench.request_parts import HEADERS, Prepare, Wire, a_routing_state, forget, open_parts, stage_functions

MODELS = (10, 100, 1_000)
SIZES = ("short", "2 KB", "agent")
BODIES, ROUNDS, REPEATED = 40, 7, 5
Stage = Callable[[bytes], Awaitable[object]]


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="uniroute-bench-") as folder:
        found = uvloop.run(measured(arguments, Path(folder)))
    if arguments.json:
        console.emit_json(found)
        return
    for size in arguments.sizes:
        names = list(found[size][str(arguments.models[0])])
        rows = [(name, *(f"{found[size][str(count)][name]:.0f}" for count in arguments.models)) for name in names]
        columns = ("µs of CPU", *(f"{count:,} models" for count in arguments.models))
        console.table(columns, rows, title=f"{size} bodies, about {found[size]['bytes']:,} bytes")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, nargs="+", default=MODELS)
    parser.add_argument("--sizes", nargs="+", default=SIZES, choices=list(KINDS))
    parser.add_argument("--bodies", type=int, default=BODIES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--embedder", type=Path, help="where an embedding table is already")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--profile", help="file for cProfile's figures of the whole path")
    return parser.parse_args()


async def measured(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    embedder = static_embedder(arguments.embedder or folder, console.echo_err)
    found: dict[str, Any] = {}
    for size in arguments.sizes:
        bodies = bodies_of(size, arguments.bodies)
        found[size] = {"bytes": len(bodies[0])}
        for count in arguments.models:
            async with AsyncExitStack() as closing:
                services = open_parts(folder / f"{size}-{count}", embedder, a_routing_state(count), closing)
                found[size][str(count)] = await one_column(services, bodies, arguments)
    return found


def bodies_of(size: str, count: int) -> list[bytes]:
    make = KINDS[size][0]
    prompts, rng = generated_prompts(10**9, seed=len(size)), Random(count)
    made = ({"model": "auto", **make(prompts, rng), "max_tokens": 64} for _ in range(count))
    return [json.dumps(body, separators=(",", ":")).encode() for body in made]


async def one_column(services: AppState, bodies: Sequence[bytes], arguments: argparse.Namespace) -> dict[str, float]:
    wire = Wire(services)
    if arguments.profile:
        await wire.profiled(bodies, arguments.profile)
    found = {name: await cost(stage, bodies, arguments.rounds) for name, stage in wire.whole().items()}
    return found | {name: await cost(stage, bodies, arguments.rounds) for name, stage in stages(services).items()}


async def cost(stage: Stage, bodies: Sequence[bytes], rounds: int) -> float:
    """Return the median over bodies of the least µs. A stage may return its own nanoseconds, or be timed outside."""
    best = [float("inf")] * len(bodies)
    for _ in range(rounds):
        for place, raw in enumerate(bodies):
            started = time.process_time_ns()
            own = await stage(raw)
            spent = time.process_time_ns() - started
            best[place] = min(best[place], own if isinstance(own, int) else spent)
    return statistics.median(best) / 1000


def stages(services: AppState) -> dict[str, Stage]:
    async def chosen(raw: bytes) -> int:
        request = parse_chat(raw, HEADERS)
        forget(services)
        started = time.process_time_ns()
        ctx = SelectionContext("dec-1", request, None, services.snapshots.current, services.settings)
        await select_model(ctx, services.assigner)
        return time.process_time_ns() - started

    alone = {name: _repeated(prepare, work) for name, (prepare, work) in stage_functions(services).items()}
    return {"parsing and checks": _parsing, "choosing, all that follows but the past": chosen, **alone}


async def _parsing(raw: bytes) -> int:
    started = time.process_time_ns()
    for _ in range(REPEATED):
        parse_chat(raw, HEADERS)
    return (time.process_time_ns() - started) // REPEATED


def _repeated(prepare: Prepare, work: Callable[[Any], object]) -> Stage:
    async def stage(raw: bytes) -> int:
        given = prepare(parse_chat(raw, HEADERS))
        started = time.process_time_ns()
        for _ in range(REPEATED):
            work(given)
        return (time.process_time_ns() - started) // REPEATED

    return stage


if __name__ == "__main__":
    main()
