"""Check that a server does not grow with the requests it has served: `python -m tests.bench.soak --requests 100000`.

One `uniroute serve` over a real Valkey, two upstream processes on loopback, and clients of every kind: answered whole,
streamed and not; gone before the first byte and midway; with sessions and tool calls; failing because of an upstream or
of themselves. A row every 5,000 requests. At the end, how memory grew over the last half, as a share of what is
resident, and whether descriptors, sockets and tasks are back where they were before. Exits 1 where they are not, or
where memory grew by more than 1 % per 100,000 requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from proxy.cli import console
from proxy.storage.redis import MAX_CONNECTIONS
from router_core.embedding import static_embedder
from tests.bench.lean_client import LeanClient
from tests.bench.process_facts import Facts, facts_of
from tests.chaos.processes import tcp_connections
from tests.chaos.questions import MODELS, Json, a_question
from tests.chaos.world import World, a_world, serving_port
from tests.support.command import ADMIN_KEY

PATH = "/v1/chat/completions"
# Requests before the start is measured: what is loaded and filled once is no growth.
WARM_UP = 2_000
# Longer than a kept upstream connection may be idle: it is looked for every 30 s, and closed after as many.
IDLE_S = 62.0
# Connections that the request of a rest may have opened itself: as many as it may ask models.
OF_ONE_REQUEST = 3
# Every fifth word touches every page of the table; so many of them are short enough for routing to read them all.
SOME, WORDS_ROUTED = 5, 400
# Percent of the resident size per 100,000 requests.
MAX_GROWTH = 1.0
KINDS: Mapping[str, float] = {
    "plain": 42, "streamed": 42, "leaves early": 4, "leaves midway": 6, "bad body": 2, "bad key": 1, "tool loop": 3,
}  # fmt: skip
_TOOL_CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
_TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@dataclass
class Load:
    """Send requests over kept connections up to a number."""

    port: int
    keys: Sequence[str]
    rng: Random
    connections: int
    sent: int = 0
    goal: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    """By kind and status."""

    async def run(self, requests: int) -> None:
        self.goal = self.sent + requests
        await asyncio.gather(*(self._connection(Random(self.rng.random())) for _ in range(self.connections)))

    async def _connection(self, rng: Random) -> None:
        client = LeanClient(self.port)
        while self.sent < self.goal:
            await self._counted(client, rng.choices(list(KINDS), list(KINDS.values()))[0], rng)
        client.close()

    async def one(self, kind: str) -> None:
        """Send one request by itself."""
        client = LeanClient(self.port)
        await self._counted(client, kind, self.rng)
        client.close()

    async def _counted(self, client: LeanClient, kind: str, rng: Random) -> None:
        self.sent += 1
        try:
            self.seen[f"{kind} {await self._send(client, kind, rng)}"] += 1
        except (OSError, asyncio.IncompleteReadError) as error:
            self.seen[f"{kind} {type(error).__name__}"] += 1
            client.close()

    async def _send(self, client: LeanClient, kind: str, rng: Random) -> str:
        body, headers = self._request(kind, rng)
        if kind.startswith("leaves"):
            await client.leave(PATH, body, headers, bytes_read=0 if kind == "leaves early" else 600)
            return "left"
        status, answer = await client.post(PATH, body, headers)
        broken = body.get("stream") and status == 200 and b"data: [DONE]" not in answer
        return f"{status} broken off" if broken else str(status)

    def _request(self, kind: str, rng: Random) -> tuple[Json, Mapping[str, str]]:
        question = a_question(self.sent, rng, words=400 if kind == "leaves midway" else rng.choice((8, 30)))
        messages: list[Json] = [{"role": "user", "content": question.prompt}]
        body: Json = {"model": rng.choice(("auto", "auto", "auto", *MODELS)), "messages": messages}
        headers = {"authorization": f"Bearer {'sk-wrong' if kind == 'bad key' else rng.choice(self.keys)}"}
        if kind in ("streamed", "leaves midway") or (kind == "leaves early" and rng.random() < 0.5):
            body |= {"stream": True}
        if kind == "bad body":
            body |= {"messages": "none"}
        if kind == "tool loop":
            messages += [{"role": "assistant", "content": None, "tool_calls": [_TOOL_CALL]}]
            messages += [{"role": "tool", "tool_call_id": "call_1", "content": "rain"}]
            body |= {"tools": [_TOOL]}
        if rng.random() < 0.2:
            headers["x-session-id"] = f"session-{rng.getrandbits(40)}"
        return body, headers


async def soak(world: World, requests: int, connections: int, every: int) -> tuple[list[Facts], Counter[str]]:
    """Return the facts at rest before, every so many requests, and at rest afterwards."""
    load = Load(serving_port(world), world.keys, Random(7), connections)
    await touch_table(world)
    await fill_pool(world)
    await load.run(WARM_UP)
    facts = [await _at_rest(world, load)]
    _row(facts[0], 0.0)
    _connections(world)
    while load.sent < WARM_UP + requests:
        started = time.monotonic()
        await load.run(min(every, WARM_UP + requests - load.sent))
        facts.append(await _facts(world, load))
        _row(facts[-1], (facts[-1].requests - facts[-2].requests) / (time.monotonic() - started))
    facts.append(await _at_rest(world, load))
    _row(facts[-1], 0.0)
    _connections(world)
    return facts, load.seen


async def touch_table(world: World) -> None:
    """Make dry runs over all the vocabulary: the embedding table is mapped, and would become resident bit by bit."""
    tokenizer = json.loads(next((world.folder / "data").glob("static-*/tokenizer.json")).read_text())
    words = [word for word in tokenizer["model"]["vocab"] if word.isalpha()][::SOME]
    client = LeanClient(serving_port(world))
    for start in range(0, len(words), WORDS_ROUTED):
        text = " ".join(words[start : start + WORDS_ROUTED])
        body = {"model": "auto", "messages": [{"role": "user", "content": text}]}
        status, _ = await client.post("/v1/route", body, {"authorization": f"Bearer {world.keys[0]}"})
        assert status == 200
    client.close()


async def fill_pool(world: World) -> None:
    """Send sessions all at once: the pool then has as many connections to the store as it will ever need."""

    async def one(number: int) -> None:
        client = LeanClient(serving_port(world))
        body = {"model": "auto", "messages": [{"role": "user", "content": "Are you there?"}]}
        await client.post(PATH, body, {"authorization": f"Bearer {world.keys[0]}", "x-session-id": f"first-{number}"})
        client.close()

    await asyncio.gather(*map(one, range(4 * MAX_CONNECTIONS)))


async def _at_rest(world: World, load: Load) -> Facts:
    """Wait until idle connections to upstreams have expired, then read the facts."""
    await asyncio.sleep(IDLE_S)
    await load.one("plain")
    return await _facts(world, load)


async def _facts(world: World, load: Load) -> Facts:
    return await asyncio.to_thread(facts_of, world.server.pid, world.server.url, ADMIN_KEY, load.sent)


def growth(facts: Sequence[Facts]) -> float:
    """Return the growth of resident memory over the last half of the rows under load: percent per 100,000 requests."""
    under_load = facts[1:-1]
    last = under_load[len(under_load) // 2 :]
    if len(last) < 2:
        return float("nan")
    slope = np.polyfit([each.requests for each in last], [each.resident for each in last], 1)[0]
    return float(100 * slope * 100_000 / np.mean([each.resident for each in last]))


def verdicts(facts: Sequence[Facts]) -> list[str]:
    """Return what has not come back, or has grown."""
    before, after = facts[0], facts[-1]
    found = [
        f"{name}: {getattr(before, name)} before and {getattr(after, name)} after"
        for name, own in (("descriptors", OF_ONE_REQUEST), ("sockets", OF_ONE_REQUEST), ("tasks", 0))
        if getattr(after, name) > getattr(before, name) + own
    ]
    if growth(facts) > MAX_GROWTH:
        found.append(f"memory grew by {growth(facts):.2f} % per 100,000 requests")
    return found


def _connections(world: World) -> None:
    """Print whose the sockets are, except those that listen or are no TCP."""
    ours, names = serving_port(world), {world.store.port: "store"}
    names |= {upstream.port: "upstreams" for upstream in world.upstreams}
    found = Counter(
        "clients" if local == ours else names.get(remote, "others")
        for local, remote in tcp_connections(world.server.pid)
    )
    console.echo("           " + ", ".join(f"{count} to {whom}" for whom, count in sorted(found.items())))


def _row(facts: Facts, rate: float) -> None:
    mib = [f"{amount / 2**20:8.1f}" for amount in (facts.resident, facts.proportional, facts.anonymous)]
    counts = f"{facts.descriptors:5} {facts.sockets:5} {facts.tasks:5}"
    console.echo(f"{facts.requests:>9,} {' '.join(mib)} {counts} {f'{rate:7.1f}' if rate else '   rest'}")


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="uniroute-soak-") as temporary:
        # A server's own data folder refers to it.
        cache = (arguments.data_dir or Path(temporary)).absolute()
        static_embedder(cache, console.echo_err)
        with a_world(Path(temporary), cache, 7, mix="quick", workers=1) as world:
            console.echo(" requests  RSS MiB  PSS MiB anon MiB   fds socks tasks  req/s")
            facts, seen = asyncio.run(soak(world, arguments.requests, arguments.connections, arguments.every))
    for kind_and_status, count in sorted(seen.items()):
        console.echo(f"  {kind_and_status}: {count:,}")
    console.echo(f"growth of resident memory over the last half: {growth(facts):+.2f} % per 100,000 requests")
    wrong = verdicts(facts)
    for problem in wrong:
        console.echo(f"WRONG: {problem}")
    sys.exit(1 if wrong else 0)


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--every", type=int, default=5_000, help="requests between two rows")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--data-dir", type=Path, help="where an embedding table is already")
    return parser.parse_args()


if __name__ == "__main__":
    main()
