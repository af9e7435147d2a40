"""CPU time of everything that is written down about a request, by stage: `python -m tests.bench.books_stages`.

The real parts: a journal on disk, an embedded Valkey, the metrics of a process, and log lines to a pipe that another
process empties. Microseconds of CPU of this process, user and system, for one request and for one streamed chunk; each
the least of several rounds. What a request waits for is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from logging.config import dictConfig
from pathlib import Path
from typing import Any

from proxy.cli import console
from proxy.cli.serve import LOGGING
from proxy.health.capacity import Capacities, CapacityLimits
from proxy.health.health import ModelHealth
from proxy.health.policy import HealthPolicy
from proxy.limits.claims import claim_of, within_claim
from proxy.limits.limiter import Limiter
from proxy.limits.scripts import SETTLE_FUNCTION
from proxy.limits.standing import Granted
from proxy.recording.journals import Journals
from proxy.recording.meter import Books, Meter
from proxy.recording.metrics import Metrics
from proxy.recording.recorder import UsageRecorder
from proxy.relay.chunks import content_bytes, has_content
from proxy.relay.marks import AnswerMarks
from proxy.relay.turns import Turn
from proxy.routing.choosing import Choice
from proxy.routing.options import Options
from proxy.routing.request import ChatRequest
from proxy.routing.thread import NO_THREAD, thread_of
from proxy.settings import Settings
from proxy.state.conversations import Conversations
from proxy.state.embedded import EmbeddedValkey
from proxy.state.live import LiveExpectations
from proxy.state.records import ClientKey
from proxy.state.snapshot import RoutingState
from proxy.state.store import Store
from proxy.trace import Trace
from tests.support.choices import a_state, chosen
from tests.support.limited_keys import a_key
from tests.support.makers import a_record, following

CHUNKS = 50
USAGE = {"prompt_tokens": 412, "completion_tokens": 96, "prompt_tokens_details": {"cached_tokens": 256}}
LIMITS: dict[str, Any] = {"requests_per_minute": 10**9, "tokens_per_minute": 10**12, "usd_per_day": 10**6}
SHORT = [{"role": "user", "content": "What is the capital of the country that I was born in?"}]
LONG = [{"role": role, "content": f"turn {place}"} for place in range(30) for role in ("user", "assistant")]


@dataclass(frozen=True)
class Room:
    """What a process keeps its books with."""

    books: Books
    health: ModelHealth
    capacities: Capacities
    limiter: Limiter
    memory: Conversations
    settings: Settings
    routing: RoutingState
    choice: Choice

    def meter(self, key: ClientKey | None = None, granted: Granted | None = None) -> Meter:
        choice = replace(self.choice, id=f"dec-{uuid.uuid4().hex}")
        marks = AnswerMarks(self.memory, NO_THREAD, SHORT)
        return Meter(self.books, choice, key, Trace("req-1"), time.monotonic(), marks, granted)

    async def turn(self, meter: Meter) -> Turn:
        """As forwarding takes it."""
        self.health.resting()
        slot = await self.capacities.slot(self.choice.model, CapacityLimits(64, 64, 5.0))
        self.health.resting()
        return Turn(meter, self.health.begin(self.choice.model), slot, hurried=False)


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
    with tempfile.TemporaryDirectory(prefix="uniroute-bench-") as name, _emptied_pipe() as pipe:
        dictConfig({**LOGGING, "handlers": {"stderr": {**LOGGING["handlers"]["stderr"], "fd": pipe.fileno()}}})
        async with _room(Path(name)) as room:
            if arguments.profile:
                await _profile(room, arguments.times)
                return
            rows = [(what, f"{await _least_us(arguments, work):.2f}") for what, work in _stages(room)]
            recorded, sent = await _recorder_us(room, arguments)
            rows += [("record: to_json and journal", f"{recorded:.2f}"), ("journal to Redis, a record", f"{sent:.2f}")]
            console.table(("stage", "CPU us"), rows, title="the least of the rounds")


def _emptied_pipe() -> Any:
    """Where log lines go: a pipe, as a container's runtime reads it."""
    reader = subprocess.Popen(
        [sys.executable, "-c", "import os\nwhile os.read(0, 1 << 16): pass"], stdin=subprocess.PIPE
    )
    assert reader.stdin is not None
    return os.fdopen(os.dup(reader.stdin.fileno()), "w", buffering=1)


@asynccontextmanager
async def _room(folder: Path) -> AsyncIterator[Room]:
    server = EmbeddedValkey(folder)
    await asyncio.to_thread(server.ensure)
    store = Store(f"unix://{server.socket_path}")
    try:
        metrics, live = Metrics(), LiveExpectations(4)
        async with following(store, folder, a_record("cheap"), a_record("dear"), live=live) as state:
            usage = UsageRecorder(store, Journals(folder / "usage", 10**9), settle_function=SETTLE_FUNCTION)
            routing, limiter = a_state(), Limiter(store, metrics, timeout_s=5.0)
            yield Room(
                books=Books(state, usage, metrics, live),
                health=ModelHealth(HealthPolicy()),
                capacities=Capacities(),
                limiter=limiter,
                memory=Conversations(store, 3600),
                settings=Settings(data_dir=folder),
                routing=routing,
                choice=await chosen(state=routing),
            )
            await limiter.close()
            await usage.stop()
    finally:
        await store.close()
        await asyncio.to_thread(server.stop)


Work = Callable[[int], Awaitable[None]]


def _stages(room: Room) -> list[tuple[str, Work]]:
    plain, limited = a_key(), a_key(**LIMITS)
    chunk = _chunk({"content": " word"})
    call = _chunk({"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]})
    return [
        ("thread of one turn", _threads(room, SHORT)),
        ("thread of 60 turns", _threads(room, LONG)),
        ("meter and marks", _meters(room)),
        ("turn: rests, place, breaker", _turns(room)),
        ("headers", _headers(room)),
        ("finish", _finishes(room)),
        ("one plain chunk", _chunks(room, chunk)),
        (
            "one chunk with a call",
            _chunks(room, call),
        ),
        ("reserve, alone", _reserves(room, limited, at_once=1)),
        ("reserve, 16 at once", _reserves(room, limited, at_once=16)),
        ("request without a key, all but chunks", _requests(room, None)),
        ("request with a key", _requests(room, plain)),
        ("request with a limited key, 16 at once", _requests(room, limited, at_once=16)),
    ]


def _threads(room: Room, messages: list[Any]) -> Work:
    request = ChatRequest({"messages": messages}, "auto", False, False, Options())

    async def work(times: int) -> None:
        for _ in range(times):
            await thread_of(room.memory, request, None, room.settings)

    return work


def _meters(room: Room) -> Work:
    choice, trace = room.choice, Trace("req-1")

    async def work(times: int) -> None:
        for _ in range(times):
            Meter(room.books, choice, None, trace, 0.0, AnswerMarks(room.memory, NO_THREAD, SHORT))

    return work


def _turns(room: Room) -> Work:
    meter = room.meter()

    async def work(times: int) -> None:
        for _ in range(times):
            turn = await room.turn(meter)
            turn.begun()
            turn.answered()
            turn.close()

    return work


def _headers(room: Room) -> Work:
    meter = room.meter()
    meter.asking(meter.choice.model)

    async def work(times: int) -> None:
        for _ in range(times):
            meter.headers()

    return work


def _finishes(room: Room) -> Work:
    async def work(times: int) -> None:
        meters = [_begun(room.meter()) for _ in range(times)]
        before = time.process_time()
        for meter in meters:
            meter.finish("complete")
        work.own = time.process_time() - before  # type: ignore[attr-defined]

    return work


def _begun(meter: Meter) -> Meter:
    meter.asking(meter.choice.model)
    meter.first_content()
    meter.used(USAGE)
    return meter


def _chunk(delta: dict[str, Any]) -> dict[str, Any]:
    about = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": "cheap"}
    return {**about, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


def _chunks(room: Room, chunk: dict[str, Any]) -> Work:
    """What streaming asks of the books, chunk by chunk."""

    async def work(times: int) -> None:
        meter = room.meter()
        for _ in range(times):
            has_content(chunk)
            meter.marks.see(chunk, meter.model)
            meter.received(content_bytes(chunk))
            if chunk.get("usage"):
                meter.used(chunk["usage"])

    return work


def _reserves(room: Room, key: ClientKey, *, at_once: int) -> Work:
    async def one() -> None:
        choice = within_claim(replace(room.choice, id=uuid.uuid4().hex), key.limits)
        claim = claim_of(choice, room.routing, room.settings, key.limits)
        await room.limiter.reserve(key, replace(claim, lives_s=0.001))

    return _together(one, at_once)


def _requests(room: Room, key: ClientKey | None, *, at_once: int = 1) -> Work:
    """As pipeline and streaming go about it."""
    request = ChatRequest({"messages": SHORT}, "auto", True, False, Options())

    async def one() -> None:
        thread = await thread_of(room.memory, request, key, room.settings)
        choice, granted = room.choice, None
        if key is not None and key.limits.any:
            choice = within_claim(replace(choice, id=uuid.uuid4().hex), key.limits)
            granted = await room.limiter.reserve(key, claim_of(choice, room.routing, room.settings, key.limits))
        marks = AnswerMarks(room.memory, thread, SHORT)
        meter = Meter(room.books, choice, key, Trace("req-1"), time.monotonic(), marks, granted)
        turn = await room.turn(meter)
        meter.asking(choice.model)
        turn.begun()
        meter.headers()
        meter.used(USAGE)
        turn.answered()
        meter.finish("complete")
        turn.close()

    return _together(one, at_once)


def _together(one: Callable[[], Awaitable[None]], at_once: int) -> Work:
    async def worker(times: int) -> None:
        for _ in range(times):
            await one()

    async def work(times: int) -> None:
        await asyncio.gather(*(worker(times // at_once) for _ in range(at_once)))

    return work


async def _least_us(arguments: argparse.Namespace, work: Work) -> float:
    taken: list[float] = []
    await work(16)
    for _ in range(arguments.rounds):
        gc.collect()
        before = time.process_time()
        await work(arguments.times)
        spent = time.process_time() - before
        taken.append(getattr(work, "own", spent))
        await asyncio.sleep(0.05)  # so that the connections to the store are read, and none is taken for silent
    return min(taken) / int(arguments.times) * 1e6


async def _recorder_us(room: Room, arguments: argparse.Namespace) -> tuple[float, float]:
    """To write a record down, and then to bring it to Redis."""
    usage = room.books.usage
    entry = _begun(room.meter())._record("complete")
    await usage.flush()
    recorded, sent = [], []
    for _ in range(arguments.rounds):
        begun = time.process_time()
        for _ in range(arguments.times):
            usage.record(entry)
        written = time.process_time()
        await usage.flush()
        recorded.append(written - begun)
        sent.append(time.process_time() - written)
    return min(recorded) / arguments.times * 1e6, min(sent) / arguments.times * 1e6


async def _profile(room: Room, times: int) -> None:
    import cProfile
    import pstats

    work = _requests(room, None)
    await work(100)
    profile = cProfile.Profile()
    profile.enable()
    await work(times)
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(45)


if __name__ == "__main__":
    main()
