"""µs of CPU that traces and metrics for OpenTelemetry add to a request: on the event loop, and in all threads.

A request without its upstream, as in accounting_stages. The collector is a process of its own. Variables of
OpenTelemetry are honoured: OTEL_TRACES_SAMPLER=always_off, OTEL_TRACES_EXPORTER=none.

    python -m tests.bench.tracing_cost
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from proxy.cli import console
from proxy.observability.otlp import open_telemetry
from proxy.observability.tracing import Tracing
from proxy.routing.affinity import NO_AFFINITY
from proxy.server.api.client_apis import CHAT
from proxy.server.dependencies import RequestContext
from proxy.server.exchange import ASGIExchange
from proxy.server.request_log import RequestRecord
from proxy.server.requests import REQUEST_IDS, RequestIds
from proxy.upstream.payload import JSONPayload
from tests.bench.accounting_fixtures import REQUEST, USAGE, AccountingParts, open_parts
from tests.bench.accounting_stages import uvloop_or_not

COLLECTOR = """
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""
ANSWER = JSONPayload(
    {
        "id": "chatcmpl-1",
        "model": "theirs",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Yes."}}],
    }
)
IDS = RequestIds("req-1")
ASKED: dict[str, Any] = {"path": CHAT.path, "headers": [(b"user-agent", b"bench")], REQUEST_IDS: IDS}
SETTLE_S = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=500, help="in a round")
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    with collector() as url:
        os.environ |= {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        uvloop_or_not().run(_measure(arguments.times, arguments.rounds))


@contextmanager
def collector() -> Iterator[str]:
    with subprocess.Popen([sys.executable, "-c", COLLECTOR], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.kill()


async def _measure(times: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="uniroute-bench-") as folder:
        async with (
            open_parts(Path(folder)) as parts,
            open_telemetry(parts.app.settings, os.environ, parts.app.metrics) as tracing,
        ):
            least: dict[str, tuple[float, float]] = {}
            for _ in range(rounds):
                for title, chosen in (("without", None), ("with", tracing)):
                    taken = await _round(parts, chosen, times)
                    least[title] = min(taken, least.get(title, taken))
    rows = [(title, f"{on_loop:.1f}", f"{everywhere:.1f}") for title, (on_loop, everywhere) in least.items()]
    console.table(("traces and metrics", "event loop us", "all threads us"), rows, title="the least of the rounds")


async def _round(parts: AccountingParts, tracing: Tracing | None, times: int) -> tuple[float, float]:
    """Return µs of CPU a request: of this thread, and of the whole process until everything is sent."""
    process_s, thread_s = time.process_time(), time.thread_time()
    for number in range(times):
        _request(parts, tracing)
        if number % 100 == 99:
            await asyncio.sleep(0.01)
    thread_s = time.thread_time() - thread_s
    await asyncio.sleep(SETTLE_S)
    return thread_s / times * 1e6, (time.process_time() - process_s) / times * 1e6


async def never() -> Any:
    raise NotImplementedError


def _request(parts: AccountingParts, tracing: Tracing | None) -> None:
    trace = None if tracing is None else tracing.begin(ASGIExchange(ASKED, never))
    ctx = RequestContext(parts.app, parts.routing, REQUEST, None, IDS, time.monotonic(), trace=trace)
    record = RequestRecord(ctx, parts.selection, NO_AFFINITY)
    record.start_attempt(parts.selection.model)
    if trace is not None:
        trace.headers()
        trace.observe(ANSWER)
    record.set_usage(USAGE)
    record.finish("complete")
    if trace is not None:
        trace.end(200)


if __name__ == "__main__":
    main()
