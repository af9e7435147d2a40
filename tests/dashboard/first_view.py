"""Measure the first view while requests pass: `python -m tests.dashboard.first_view [REQUESTS A SECOND]`."""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx
import yaml

from tests.conftest import CACHE
from tests.dashboard.site import MODELS, varied_profile
from tests.support.command import ServeCommand, environment
from tests.support.proxy_process import ADMIN_KEY, model_entry
from tests.support.scripted_upstream import ScriptedUpstream

VIEWS = ("", "/models", "/model?name=large", "/curve", "/quality", "/keys")

ROUNDS = 15


async def load(url: str, per_s: float, done: asyncio.Event, sent: list[float]) -> None:
    """Send requests at a steady rate, however long each takes."""
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(timeout=60, limits=limits) as client:

        async def ask() -> None:
            began = time.perf_counter()
            body = {"model": "auto", "messages": [{"role": "user", "content": "What is 2 + 2?"}]}
            reply = await client.post(f"{url}/v1/chat/completions", json=body)
            if reply.status_code == 200:
                sent.append(time.perf_counter() - began)

        tasks = set()
        while not done.is_set():
            task = asyncio.create_task(ask())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            await asyncio.sleep(1 / per_s)
        await asyncio.gather(*tasks)


async def visit(url: str, cookie: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {view: [] for view in VIEWS}
    async with httpx.AsyncClient(timeout=60, headers={"cookie": cookie}) as client:
        for view in VIEWS:
            for _ in range(ROUNDS):
                began = time.perf_counter()
                reply = await client.get(f"{url}/dashboard{view}")
                while reply.headers.get("refresh"):
                    reply = await client.get(f"{url}/dashboard{view}")
                assert reply.status_code == 200, reply.text
                found[view].append(1e3 * (time.perf_counter() - began))
    return found


def log_in(url: str) -> str:
    with httpx.Client(timeout=60, headers={"origin": url}) as client:
        token = client.get(f"{url}/dashboard/login").text.split('name="token" value="')[1].split('"')[0]
        client.post(f"{url}/dashboard/login", data={"token": token, "key": ADMIN_KEY})
        return f"uniroute_session={client.cookies['uniroute_session']}"


async def measure(url: str, per_s: float) -> None:
    cookie = log_in(url)
    sent: list[float] = []
    done = asyncio.Event()
    loading = asyncio.create_task(load(url, per_s, done, sent))
    await asyncio.sleep(3)
    began, before = time.perf_counter(), len(sent)
    found = await visit(url, cookie)
    rate = (len(sent) - before) / (time.perf_counter() - began)
    done.set()
    await loading
    sys.stdout.write(f"{rate:.0f} requests a second were answered meanwhile (asked for: {per_s:g})\n")
    for view, times in found.items():
        sys.stdout.write(
            f"/dashboard{view}: first {times[0]:.0f} ms, median {statistics.median(times):.0f} ms,"
            f" worst {max(times):.0f} ms\n"
        )


def main() -> None:
    per_s = float(sys.argv[1]) if len(sys.argv) > 1 else 200.0
    with tempfile.TemporaryDirectory() as name, ScriptedUpstream(lambda _: "4") as upstream:
        folder = Path(name)
        config = {
            "model_list": [model_entry(model, upstream.url, price=price) for model, _, price in MODELS],
            "uniroute": {"profile": {"on_start": False}},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        environ = {**environment(folder, CACHE), "MODEL_API_KEY": "sk-x", "UNIROUTE_ADMIN_KEY": ADMIN_KEY}
        with ServeCommand("--config", folder / "config.yaml", environ=environ, log=folder / "log.txt") as server:
            for seed, (model, mean, _) in enumerate(MODELS, 1):
                address = f"{server.url}/admin/models/{model}/profile"
                headers = {"authorization": f"Bearer {ADMIN_KEY}"}
                httpx.post(address, json=varied_profile(model, mean, seed=seed), headers=headers, timeout=60)
            sys.stdout.write(f"{os.cpu_count()} cores\n")
            asyncio.run(measure(server.url, per_s))


if __name__ == "__main__":
    main()
