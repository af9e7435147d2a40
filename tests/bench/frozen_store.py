"""Measure what a frozen store costs: requests before and meanwhile, and every admin call. Prints a table.

python -m tests.bench.frozen_store [--requests 200] [--external]
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from proxy.cli import console
from tests.conftest import CACHE
from tests.faults.gateway import CONFIGURED, PRICE, QUESTION, Gateway, a_gateway, embedded_pid
from tests.support.proxy_process import model_entry, uniform_profile
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.valkey import ValkeyServer, frozen

ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--external", action="store_true", help="a Valkey on a TCP port instead of the embedded one")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        upstream = stack.enter_context(ScriptedUpstream())
        valkey = stack.enter_context(ValkeyServer(folder / "valkey")) if options.external else None
        environ = {"UNIROUTE_REDIS_URL": valkey.url} if valkey else {}
        gateway = stack.enter_context(a_gateway(folder, CACHE, upstream, environ=environ))
        assert gateway.add("kept").status_code == 201
        measure(gateway, valkey.pid if valkey else embedded_pid(gateway), options.requests)


def measure(gateway: Gateway, pid: int, requests: int) -> None:
    latencies(gateway, 20)
    for _ in range(ROUNDS):
        print_row("answering", latencies(gateway, requests))
        with frozen(pid):
            print_row("frozen, from its first moment", latencies(gateway, requests))
        wait_until_it_answers(gateway)
    for name, call in admin_calls(gateway).items():
        with frozen(pid):
            started = time.perf_counter()
            status = call().status_code
            first = time.perf_counter() - started
            started = time.perf_counter()
            call()
            second = time.perf_counter() - started
        console.echo(f"{name:<40} {status}  {first * 1000:7.0f} ms, again {second * 1000:5.0f} ms")
        wait_until_it_answers(gateway)


def latencies(gateway: Gateway, requests: int) -> list[float]:
    """Return the seconds of each routed request, one after the other on one connection."""
    taken = []
    body = {"model": "auto", "messages": QUESTION}
    with httpx.Client(base_url=gateway.url, timeout=20) as client:
        for _ in range(requests):
            started = time.perf_counter()
            assert client.post("/v1/chat/completions", json=body).status_code == 200
            taken.append(time.perf_counter() - started)
    return taken


def print_row(name: str, taken: list[float]) -> None:
    ordered = sorted(taken)
    p99 = ordered[int(0.99 * len(ordered))]
    console.echo(
        f"{name:<40} {len(taken)} requests: median {statistics.median(taken) * 1000:.1f} ms,"
        f" 99th percentile {p99 * 1000:.1f} ms, slowest {ordered[-1] * 1000:.1f} ms"
    )


def admin_calls(gateway: Gateway) -> dict[str, Callable[[], httpx.Response]]:
    to_measure = {**model_entry("late", gateway.upstream.url), "profile": {"prompts": 20, "max_usd": 1.0}}
    with_profile = {**model_entry("later", gateway.upstream.url), "profile": uniform_profile(0.1)}
    calls = [
        ("POST", "/models", to_measure),
        ("POST", "/models", with_profile),
        ("POST", "/models/kept/profile", {"prompts": 20}),
        ("POST", f"/models/{CONFIGURED}/profile", uniform_profile(0.1)),
        ("PUT", "/models/kept/pricing", PRICE),
        ("PATCH", "/models/kept", {"model_info": {"max_input_tokens": 5000}}),
        ("DELETE", "/models/kept", None),
        ("GET", "/models", None),
        ("GET", "/models/kept", None),
        ("GET", "/models/nobody", None),
        ("GET", "/jobs/none", None),
        ("DELETE", "/jobs/none", None),
    ]
    return {
        f"{method} {path}{' (asking)' if body is to_measure else ''}": lambda call=(method, path, body): gateway.admin(
            *call
        )  # type: ignore[misc]
        for method, path, body in calls
    }


def wait_until_it_answers(gateway: Gateway) -> None:
    while gateway.put_price("kept").status_code == 503 or gateway.ready()["store"] != "up":
        time.sleep(0.05)
    time.sleep(0.6)  # its followers have noticed too


if __name__ == "__main__":
    main()
