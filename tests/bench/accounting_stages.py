"""Measure the CPU time of everything that is recorded of a request: `python -m tests.bench.accounting_stages`.

The real parts: a journal on disk, an embedded Valkey, the metrics of a process, and log lines to a pipe that another
process empties. Microseconds of CPU of this process, user and system, for one request and for one streamed chunk; each
is the least of several rounds. The time that a request waits is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from logging.config import dictConfig
from pathlib import Path
from typing import Any

from proxy.cli import console
from proxy.routing.affinity import NO_AFFINITY, load_affinity
from proxy.routing.chat_request import ChatRequest, RoutingOptions
from proxy.server.completions import reserve
from proxy.server.request_log import RequestRecord
from proxy.server.reservations import UsageEstimate, limit_to_reserved, reservation_request
from proxy.server.run import LOGGING
from proxy.storage.client_keys import ClientKey
from proxy.upstream.payload import has_content
from tests.bench.accounting_fixtures import REQUEST, SHORT, USAGE, AccountingParts, emptied_pipe, open_parts, started
from tests.support.limited_keys import a_key

LIMITS: dict[str, Any] = {"requests_per_minute": 10**9, "tokens_per_minute": 10**12, "usd_per_day": 10**6}
LONG = [{"role": role, "content": f"turn {place}"} for place in range(30) for role in ("user", "assistant")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=1_000, help="in a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--profile", action="store_true", help="cProfile of the request without a key, instead")
    arguments = parser.parse_args()
    uvloop_or_not().run(_measure(arguments))


def uvloop_or_not() -> Any:
    if os.name != "posix":
        return asyncio
    import uvloop

    return uvloop


async def _measure(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="uniroute-bench-") as name, emptied_pipe() as pipe:
        dictConfig({**LOGGING, "handlers": {"stderr": {**LOGGING["handlers"]["stderr"], "fd": pipe.fileno()}}})
        async with open_parts(Path(name)) as parts:
            if arguments.profile:
                await _profile(parts, arguments.times)
                return
            rows = [(title, *await _least_us(parts, arguments, work)) for title, work in _stages(parts)]
            console.table(("stage", "CPU us", "Valkey's"), rows, title="the least of the rounds")


Work = Callable[[int], Awaitable[None]]


def _stages(parts: AccountingParts) -> list[tuple[str, Work]]:
    plain, limited = a_key(), a_key(**LIMITS)
    chunk = _chunk({"content": " word"})
    call = _chunk({"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]})
    return [
        ("affinity of one turn", _affinities(parts, SHORT)),
        ("affinity of 60 turns", _affinities(parts, LONG)),
        ("record", _new_records(parts)),
        ("attempt: health, slot, breaker", _attempts(parts)),
        ("headers", _headers(parts)),
        ("finish", _finishes(parts)),
        ("of it: the record and its journal", _records(parts)),
        ("afterwards: a record from the journal to Redis", _flushes(parts)),
        ("one plain chunk", _chunks(parts, chunk)),
        (
            "one chunk with a call",
            _chunks(parts, call),
        ),
        ("reserve, alone", _reserves(parts, limited, at_once=1)),
        ("reserve, 16 at once", _reserves(parts, limited, at_once=16)),
        ("request without a key, all but chunks", _requests(parts, None)),
        ("request with a key", _requests(parts, plain)),
        ("request with a limited key, 16 at once", _requests(parts, limited, at_once=16)),
    ]


def _affinities(parts: AccountingParts, messages: list[Any]) -> Work:
    request = ChatRequest({"messages": messages}, "auto", False, False, RoutingOptions())

    async def work(times: int) -> None:
        for _ in range(times):
            await load_affinity(parts.app.sessions, request, None, parts.app.settings)

    return work


def _new_records(parts: AccountingParts) -> Work:
    ctx = parts.context()

    async def work(times: int) -> None:
        for _ in range(times):
            RequestRecord(ctx, parts.selection, NO_AFFINITY)

    return work


def _attempts(parts: AccountingParts) -> Work:
    async def work(times: int) -> None:
        for _ in range(times):
            attempt = await parts.attempt()
            attempt.first_content()
            attempt.succeeded()
            attempt.abandoned()

    return work


def _headers(parts: AccountingParts) -> Work:
    record = parts.record()
    record.start_attempt(record.selection.model)

    async def work(times: int) -> None:
        for _ in range(times):
            record.headers()

    return work


def _finishes(parts: AccountingParts) -> Work:
    async def work(times: int) -> None:
        records = [started(parts.record()) for _ in range(times)]
        before = time.process_time()
        for record in records:
            record.finish("complete")
        work.own = time.process_time() - before  # type: ignore[attr-defined]

    return work


def _records(parts: AccountingParts) -> Work:
    usage, entry = parts.app.usage, started(parts.record())._write_usage("complete")

    async def work(times: int) -> None:
        for _ in range(times):
            usage.record(entry)

    return work


def _flushes(parts: AccountingParts) -> Work:
    usage, record = parts.app.usage, _records(parts)

    async def work(times: int) -> None:
        await record(times)
        before = time.process_time()
        await usage.flush()
        work.own = time.process_time() - before  # type: ignore[attr-defined]

    return work


def _chunk(delta: dict[str, Any]) -> dict[str, Any]:
    about = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": "cheap"}
    return {**about, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


def _chunks(parts: AccountingParts, chunk: dict[str, Any]) -> Work:
    """Record a stream chunk by chunk."""

    async def work(times: int) -> None:
        record = parts.record()
        for _ in range(times):
            has_content(chunk)
            record.observe(chunk)

    return work


def _reserves(parts: AccountingParts, key: ClientKey, *, at_once: int) -> Work:
    async def one() -> None:
        selection = limit_to_reserved(replace(parts.selection, id=uuid.uuid4().hex), key.limits)
        estimate = UsageEstimate(selection, REQUEST.body, parts.routing, parts.app.settings)
        await parts.app.rate_limiter.reserve(key, replace(reservation_request(estimate, key.limits), ttl_s=0.001))

    return _together(one, at_once)


def _requests(parts: AccountingParts, key: ClientKey | None, *, at_once: int = 1) -> Work:
    """Record whole requests as completions, attempts and streaming do."""

    async def one() -> None:
        ctx = parts.context(key)
        affinity = await load_affinity(ctx.app.sessions, ctx.request, key, ctx.app.settings)
        selection, reservation = await reserve(ctx, replace(parts.selection, id=uuid.uuid4().hex))
        record = RequestRecord(ctx, selection, affinity, reservation)
        attempt = await parts.attempt()
        record.start_attempt(selection.model)
        record.first_content()
        attempt.first_content()
        record.headers()
        record.set_usage(USAGE)
        attempt.succeeded()
        record.finish("complete")
        attempt.abandoned()

    return _together(one, at_once)


def _together(one: Callable[[], Awaitable[None]], at_once: int) -> Work:
    async def worker(times: int) -> None:
        for _ in range(times):
            await one()

    async def work(times: int) -> None:
        await asyncio.gather(*(worker(times // at_once) for _ in range(at_once)))

    return work


async def _least_us(parts: AccountingParts, arguments: argparse.Namespace, work: Work) -> tuple[str, str]:
    """Return the least microseconds of CPU of this process, and of the store."""
    taken: list[float] = []
    store_taken: list[float] = []
    await work(16)
    for _ in range(arguments.rounds):
        gc.collect()
        store_before, before = await parts.valkey_s(), time.process_time()
        await work(arguments.times)
        spent = time.process_time() - before
        taken.append(getattr(work, "own", spent))
        store_taken.append(await parts.valkey_s() - store_before)
        await parts.app.usage.flush()
        await asyncio.sleep(0.05)  # so that the connections to the store are read, and none is taken for silent
    return f"{min(taken) / arguments.times * 1e6:.2f}", f"{min(store_taken) / arguments.times * 1e6:.0f}"


async def _profile(parts: AccountingParts, times: int) -> None:
    import cProfile
    import pstats

    work = _requests(parts, None)
    await work(100)
    profile = cProfile.Profile()
    profile.enable()
    await work(times)
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(45)


if __name__ == "__main__":
    main()
