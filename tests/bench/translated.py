"""Measure what our side adds to litellm's SDK: `python -m tests.bench.translated`.

In one process, calls of the bare SDK (`litellm.acompletion`, over the transport that litellm makes by default) and
ours, which the same litellm translates, take turns in short slices, so that what the machine does meanwhile hits both
alike. The upstream is a loopback server on the other core. Figures are medians over slices; a ratio is the median of
those of neighbouring slices. "silent" is the bare SDK without the log entries that ours does not make either.
Linux, two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import uvloop

from proxy.cli import console
from proxy.settings.schema import Settings
from proxy.upstream.client import UpstreamClient
from proxy.upstream.litellm_transport import disable_request_logging, import_litellm
from tests.bench.overhead.__main__ import two_cores
from tests.bench.overhead.bodies import LIMIT, write_record
from tests.bench.overhead.compiled import Upstream
from tests.bench.overhead.upstream import CHUNKS, write_answers
from tests.bench.prompts import generated_prompts
from tests.support.chunk_streams import PulledBlocks
from tests.support.makers import PRICED, a_record
from tests.support.native_answers import event

BARE, SILENT, OURS = "bare SDK", "bare SDK, silent", "ours"
VARIANTS = (BARE, SILENT, OURS)
# Format of the upstream → the model, as litellm names it.
FORMATS = {"OpenAI": "openai/bench", "Anthropic": "anthropic/claude-sonnet-4-5"}
CONNECTIONS = (1, 16)
KEY = "sk-of-the-bench"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"

Call = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Case:
    """Describe calls of one kind."""

    format: str
    stream: bool
    connections: int

    @property
    def name(self) -> str:
        return f"{self.format}, {'stream' if self.stream else 'whole'}, {self.connections} at once"


@dataclass(frozen=True)
class Spent:
    """What one call took in one slice, in µs."""

    cpu: float
    wall: float


Slices = Mapping[str, Sequence[Spent]]


def main() -> None:
    arguments = _arguments()
    cores = two_cores()
    os.sched_setaffinity(0, {cores.gateway})
    cases = [Case(*each) for each in _combinations(arguments)]
    found: dict[str, Slices] = {}
    with tempfile.TemporaryDirectory(prefix="uniroute-bench-") as name:
        for format_ in arguments.formats:
            answers = Path(name) / format_
            write_answers(answers) if format_ == "OpenAI" else write_anthropic_answers(answers)
            with Upstream(Path(name), cores.load, answers=answers) as upstream:
                of_format = [case for case in cases if case.format == format_]
                found |= uvloop.run(measured(of_format, upstream, arguments))
    if arguments.json:
        console.emit_json({case: {name: as_json(each) for name, each in of.items()} for case, of in found.items()})
        return
    columns = ("calls", *(f"{name}, µs of CPU" for name in VARIANTS), "ours ÷ bare", "ours ÷ silent", "wall ÷ bare")
    console.table(columns, [(case, *row(slices)) for case, slices in found.items()], title="translated calls")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--connections", type=int, nargs="+", default=CONNECTIONS)
    parser.add_argument("--kinds", nargs="+", default=["whole", "stream"], choices=["whole", "stream"])
    parser.add_argument("--slices", type=int, default=30, help="of each variant")
    parser.add_argument("--seconds", type=float, default=0.25, help="of a slice")
    parser.add_argument("--json", action="store_true", help="every slice, on stdout alone")
    parser.add_argument("--profile", type=Path, help="file for cProfile's figures of ours, in place of a table")
    return parser.parse_args()


def _combinations(arguments: argparse.Namespace) -> Iterator[tuple[str, bool, int]]:
    for format_ in arguments.formats:
        for kind in arguments.kinds:
            for connections in arguments.connections:
                yield format_, kind == "stream", connections


def write_anthropic_answers(path: Path) -> Path:
    """Write Anthropic's answer and its stream, of as many words as OpenAI's, as records of the upstream."""
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-sonnet-4-5"}
    start: dict[str, Any] = {**message, "content": [], "usage": {"input_tokens": 20, "output_tokens": 1}}
    content = [{"type": "text", "text": "word " * CHUNKS}]
    usage = {"input_tokens": 20, "output_tokens": CHUNKS}
    body = json.dumps({**message, "content": content, "stop_reason": "end_turn", "usage": usage}).encode()
    text = {"type": "text_delta", "text": "word "}
    events = [
        event({"type": "message_start", "message": start}),
        event({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}),
        *(event({"type": "content_block_delta", "index": 0, "delta": text}) for _ in range(CHUNKS)),
        event({"type": "content_block_stop", "index": 0}),
        event({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": CHUNKS}}),
        event({"type": "message_stop"}),
    ]
    first, *others = [b"%x\r\n%s\r\n" % (len(each), each) for each in events]
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    with path.open("wb") as file:
        for record in (head + body, STREAM_HEAD + first, *others[:-1], others[-1] + b"0\r\n\r\n"):
            write_record(file, record)
    return path


async def measured(cases: Sequence[Case], upstream: Upstream, arguments: argparse.Namespace) -> dict[str, Slices]:
    found: dict[str, Slices] = {}
    for case in cases:
        async with calls_of(case, upstream) as variants:
            for call in variants.values():
                await spend(call, case, 0.5)  # connections, imports, caches
            if arguments.profile:
                await profiled(variants[OURS], case, arguments.profile)
                continue
            found[case.name] = await in_turns(variants, case, arguments.slices, arguments.seconds)
    return found


async def in_turns(variants: Mapping[str, Call], case: Case, slices: int, seconds: float) -> Slices:
    found: dict[str, list[Spent]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(slices):
        for name in names if turn % 2 else reversed(names):
            found[name].append(await spend(variants[name], case, seconds))
    return found


async def spend(call: Call, case: Case, seconds: float) -> Spent:
    """Call for so many seconds, and return what one call took."""
    bodies, count = prompts(), 0
    next(bodies)  # the words are read from files
    started, cpu = time.perf_counter(), time.process_time()

    async def keep_calling() -> None:
        nonlocal count
        while time.perf_counter() - started < seconds:
            await call({"messages": [{"role": "user", "content": next(bodies)}], "max_tokens": LIMIT})
            count += 1

    await asyncio.gather(*(keep_calling() for _ in range(case.connections)))
    spent = Spent(time.process_time() - cpu, time.perf_counter() - started)
    return Spent(spent.cpu / count * 1e6, spent.wall / count * 1e6)


def prompts() -> Iterator[str]:
    while True:
        yield from generated_prompts(10_000, seed=time.perf_counter_ns())


@asynccontextmanager
async def calls_of(case: Case, upstream: Upstream) -> AsyncIterator[Mapping[str, Call]]:
    base = upstream.url if case.format == "OpenAI" else upstream.url.removesuffix("/v1")
    async with bare_client(case.format, base) as bare:
        ours = UpstreamClient(Settings(), {})
        await ours.ensure_litellm()
        yield calls(case, base, bare, ours)
        await ours.aclose()


def calls(case: Case, base: str, bare: Any, ours: UpstreamClient) -> Mapping[str, Call]:
    litellm = import_litellm()
    record = a_record(info={**PRICED, "forward": "translate"}, model=FORMATS[case.format], api_base=base, api_key=KEY)

    async def call_bare(body: dict[str, Any]) -> None:
        answer = await litellm.acompletion(
            **body,
            model=FORMATS[case.format],
            stream=case.stream,
            stream_options={"include_usage": True} if case.stream else None,
            api_base=base,
            api_key=KEY,
            max_retries=0,
            client=bare,
            _skip_mcp_handler=True,
        )
        await consumed(answer, stream=case.stream)

    async def call_silent(body: dict[str, Any]) -> None:
        async def alone() -> None:
            disable_request_logging()
            await call_bare(body)

        await asyncio.create_task(alone())  # the switch is of the task

    async def call_ours(body: dict[str, Any]) -> None:
        if not case.stream:
            assert (await ours.complete(record, body)).body["choices"]
            return
        count = 0
        async for block in PulledBlocks(await ours.stream(record, {**body, "stream": True})):
            count += len(block)
        assert count >= CHUNKS

    return {BARE: call_bare, SILENT: call_silent, OURS: call_ours}


async def consumed(answer: Any, *, stream: bool) -> None:
    if not stream:
        assert answer.choices
        return
    count = 0
    async for _ in answer:
        count += 1
    assert count >= CHUNKS


@cache
def default_clients() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return what makes httpx clients for OpenAI's SDK and for litellm's handler, before ours replace them."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    from litellm.llms.custom_httpx.http_handler import AsyncHTTPHandler
    from litellm.llms.openai.common_utils import BaseOpenAILLM

    return BaseOpenAILLM._get_async_http_client, AsyncHTTPHandler.create_client


@asynccontextmanager
async def bare_client(format_: str, base: str) -> AsyncIterator[Any]:
    """Open the client that litellm would make by itself."""
    for_openai, for_handler = default_clients()
    litellm = import_litellm()
    if format_ == "OpenAI":
        import openai

        async with for_openai() as http:
            yield openai.AsyncOpenAI(api_key=KEY, base_url=base, http_client=http, max_retries=0)
        return
    handler = litellm.AsyncHTTPHandler()
    async with for_handler(handler, timeout=None, event_hooks=None) as http:
        handler.client = http
        yield handler


async def profiled(call: Call, case: Case, path: Path) -> None:
    profile = cProfile.Profile()
    profile.enable()
    await spend(call, case, 3.0)
    profile.disable()
    profile.dump_stats(path.with_suffix(f".{case.name.replace(', ', '-').replace(' ', '_')}"))


def row(slices: Slices) -> list[str]:
    cpu = [f"{statistics.median(each.cpu for each in slices[name]):,.0f}" for name in VARIANTS]
    ratios = (ratio(slices, BARE), ratio(slices, SILENT), ratio(slices, BARE, of="wall"))
    return cpu + [f"{each:.2f}" for each in ratios]


def ratio(slices: Slices, floor: str, *, of: str = "cpu") -> float:
    pairs = zip(slices[OURS], slices[floor], strict=True)
    return float(statistics.median(getattr(ours, of) / getattr(other, of) for ours, other in pairs))


def as_json(spent: Sequence[Spent]) -> list[tuple[float, float]]:
    return [(round(each.cpu), round(each.wall)) for each in spent]


if __name__ == "__main__":
    main()
