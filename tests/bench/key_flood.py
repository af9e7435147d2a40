"""Measure what a flood of invalid keys costs a client with a valid one: `python -m tests.bench.key_flood`.

One server process. The valid client sends one request after another, first alone, then while others send a bounded
number of requests with invalid keys. Prints medians. Every request of the flood must be refused with 401.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from proxy.cli import console
from tests.support.command import ServeCommand, environment, run_command
from tests.support.scripted_upstream import ScriptedUpstream

CONNECTIONS = 16
ALONE = 200
BODY: Any = {"model": "small", "messages": [{"role": "user", "content": "What is 2 + 2?"}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2_000)
    parser.add_argument("--data-dir", type=absolute, help="where an embedding table is already")
    parser.add_argument("--flood", metavar="URL", help="be the flood, instead of starting a server and a client")
    arguments = parser.parse_args()
    if arguments.flood:
        asyncio.run(flood(arguments.flood, arguments.requests))
        return
    with tempfile.TemporaryDirectory(prefix="uniroute-bench-") as name, ScriptedUpstream(lambda _: "4") as upstream:
        folder = Path(name)
        config = folder / "config.yaml"
        config.write_text(
            "model_list:\n  - model_name: small\n    model_info: {free: true}\n"
            f"    litellm_params: {{model: openai/small, api_base: '{upstream.url}', api_key: none}}\n"
            "uniroute: {profile: {on_start: false}}\n"
        )
        environ = environment(folder / "data", arguments.data_dir)
        made = run_command("keys", "create", "bench", "--json", environ=environ)
        with ServeCommand("--config", config, environ=environ, log=folder / "log") as served:
            asyncio.run(compare(served.url, json.loads(made.stdout)["key"], arguments.requests))


def absolute(text: str) -> Path:
    return Path(text).absolute()


async def compare(url: str, key: str, count: int) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as client:
        await timed(client, key, ALONE)
        alone = await timed(client, key, ALONE)
        flooding = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.bench.key_flood", "--flood", url, "--requests", str(count)),
            stdout=asyncio.subprocess.PIPE,
        )
        assert flooding.stdout
        assert await flooding.stdout.readline() == b"begins\n"
        output = asyncio.create_task(flooding.stdout.read())
        during: list[float] = []
        while not output.done():
            during += await timed(client, key, 1)
        await flooding.wait()
        after = await timed(client, key, ALONE)
    rows = [
        (name, str(len(times)), f"{statistics.median(times) * 1000:.2f}", f"{max(times) * 1000:.1f}")
        for name, times in (("alone", alone), ("in the flood", during), ("afterwards", after))
    ]
    console.table(("a valid client", "requests", "median ms", "longest ms"), rows)
    ratio = statistics.median(during) / statistics.median(alone)
    console.echo(f"{output.result().decode().strip()}; the valid client's median: x{ratio:.2f}")


async def timed(client: httpx.AsyncClient, key: str, count: int) -> list[float]:
    times = []
    for _ in range(count):
        started = time.perf_counter()
        reply = await client.post("/v1/chat/completions", json=BODY, headers={"authorization": f"Bearer {key}"})
        reply.raise_for_status()
        times.append(time.perf_counter() - started)
    return times


async def flood(url: str, count: int) -> None:
    """Send one request after another over kept-alive connections, as fast as they are answered."""
    parts = urlsplit(url)
    content = json.dumps(BODY).encode()
    statuses: Counter[str] = Counter()
    left = iter(range(count))

    async def send() -> None:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        for number in left:
            head = (
                f"POST /v1/chat/completions HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
                f"authorization: Bearer ur-none-{number}\r\ncontent-length: {len(content)}\r\n\r\n"
            )
            writer.write(head.encode() + content)
            answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            statuses[answer.split(" ", 2)[1]] += 1
            await reader.readexactly(int(answer.split("content-length: ")[1].split("\r\n")[0]))
        writer.close()

    started = time.perf_counter()
    print("begins", flush=True)  # noqa: T201
    await asyncio.gather(*(send() for _ in range(CONNECTIONS)))
    seconds = time.perf_counter() - started
    console.echo(f"{count:,} invalid keys over {CONNECTIONS} connections in {seconds:.1f} s: {dict(statuses)}")


if __name__ == "__main__":
    main()
