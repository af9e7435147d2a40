"""What `uniroute report` says was spent is what the upstreams' own ledgers say, of every API and ending."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest

from router_core.pricing import PICO
from tests.dashboard.site import Site
from tests.support.billing_upstream import BillingUpstream, Served, Tariff
from tests.support.command import environment, run_command
from tests.support.proxy_process import ADMIN_KEY, NO_COOLDOWN, ProxyProcess, model_entry
from tests.support.waiting import wait_until

TARIFFS = {
    "small": Tariff(Decimal("0.37"), Decimal("0.04"), Decimal("1.9")),
    "large": Tariff(Decimal("5.1"), Decimal("0.51"), Decimal("24.3")),
    "vectors": Tariff(Decimal("0.13"), Decimal("0.13"), Decimal("0")),
    "newcomer": Tariff(Decimal("0.7"), Decimal("0.7"), Decimal("2.1")),
}

# How prompts are answered; `small` is asked first, and `large` after it.
TROUBLES = ("plain", "cached", "broken", "refused", "empty")


@dataclass
class Ledgers:
    proxy: ProxyProcess
    upstreams: dict[str, BillingUpstream]
    asked: int = 0

    def picousd(self, *names: str) -> int:
        return sum(self.upstreams[name].picousd for name in names)

    def ask(self, path: str, body: dict[str, Any]) -> None:
        reply = httpx.post(f"{self.proxy.url}/v1/{path}", json=body, timeout=60)
        assert reply.status_code == 200, reply.text
        self.asked += 1

    def report(self, *arguments: str) -> str:
        environ = environment(self.proxy.folder / "cli", UNIROUTE_URL=self.proxy.url, UNIROUTE_ADMIN_KEY=ADMIN_KEY)
        done = run_command("report", *arguments, environ=environ)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def figures(self) -> dict[str, Any]:
        """Return the report, once it has every request."""
        found: list[dict[str, Any]] = []

        def is_whole() -> bool:
            found.append(json.loads(self.report("--json", "--since", "1h")))
            return bool(found[-1]["total"]["requests"] == self.asked)

        assert wait_until(is_whole)
        return found[-1]


@pytest.fixture(scope="module")
def ledgers(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Ledgers]:
    with ExitStack() as closing:
        upstreams = {
            name: closing.enter_context(BillingUpstream(tariff, falters=name == "small"))
            for name, tariff in TARIFFS.items()
        }
        models = [entry(name, upstreams[name]) for name in ("small", "large", "vectors")]
        config = {"model_list": models, "uniroute": {"profile": {"on_start": False}, "breaker": NO_COOLDOWN}}
        folder = tmp_path_factory.mktemp("ledgers")
        proxy = closing.enter_context(ProxyProcess(folder, embedder_cache, config, {"MODEL_API_KEY": "sk-x"}))
        proxy.put_profile("small", 0.2)
        proxy.put_profile("large", 0.1)
        opened = Ledgers(proxy, upstreams)
        ask_everything(opened)
        yield opened


def entry(name: str, upstream: BillingUpstream) -> dict[str, Any]:
    found = model_entry(name, upstream.url)
    more: dict[str, Any] = {"mode": "embedding"} if name == "vectors" else {}
    if name == "small":
        more = {"api": ["chat", "messages", "responses"]}
    return {**found, "model_info": {**upstream.tariff.model_info(), **more}}


def ask_everything(ledgers: Ledgers) -> None:
    for stream in (False, True):
        for trouble in TROUBLES:
            messages = [{"role": "user", "content": f"Is it so? {trouble}"}]
            ledgers.ask("chat/completions", {"model": "auto", "messages": messages, "stream": stream})
        for model in ("auto", "large"):  # in the upstream's own API, and translated
            asked = {"model": model, "stream": stream}
            for trouble in ("plain", "cached"):
                messages = [{"role": "user", "content": f"Is it so? {trouble}"}]
                ledgers.ask("messages", {**asked, "messages": messages, "max_tokens": 300})
                ledgers.ask("responses", {**asked, "input": f"Is it so? {trouble}"})
                ledgers.ask("completions", {**asked, "prompt": f"Is it so? {trouble}"})
    ledgers.ask("embeddings", {"model": "vectors", "input": "Is it so?"})


@pytest.fixture(scope="module")
def total(ledgers: Ledgers) -> dict[str, Any]:
    found: dict[str, Any] = ledgers.figures()["total"]
    return found


def test_the_report_is_the_ledgers_to_the_picodollar(ledgers: Ledgers, total: dict[str, Any]) -> None:

    assert round(total["cost_usd"] * PICO) == ledgers.picousd("small", "large", "vectors")
    assert (total["unpriced"], total["estimated"]) == (0, 0)
    of_decisions = sum(served.cached for served in answers(ledgers, "small", "large") if not served.failed)
    assert total["cached_tokens"] == of_decisions > 0


def answers(ledgers: Ledgers, *names: str) -> list[Served]:
    return [served for name in names for served in ledgers.upstreams[name].ledger]


def test_every_api_and_failure_is_in_the_ledgers(ledgers: Ledgers, total: dict[str, Any]) -> None:
    paths = {served.path for served in answers(ledgers, "small")}

    assert paths == {"/v1/chat/completions", "/v1/messages", "/v1/responses"}
    assert total["failed_attempts_cost_usd"] > 0
    assert [served.failed for served in answers(ledgers, "small", "large")].count(True) == 4
    assert {served.streamed for served in answers(ledgers, "small", "large")} == {True, False}


def test_a_cached_token_costs_the_cached_price_and_no_other(ledgers: Ledgers) -> None:
    tariff = TARIFFS["small"]
    (first, *_) = (served for served in answers(ledgers, "small") if served.cached)
    usd = (first.fresh * tariff.prompt + first.cached * tariff.cached + first.output * tariff.output) / 10**6
    listed = ledgers.proxy.admin("GET", "/admin/decisions?model=small&format=jsonl&limit=1000").text.splitlines()
    costs = {round(json.loads(line)["cost_usd"] * PICO) for line in listed}

    assert int(usd * PICO) in costs


def test_the_page_says_the_same_to_the_cent(ledgers: Ledgers, total: dict[str, Any]) -> None:
    with Site(ledgers.proxy, None).visitor() as visitor:  # type: ignore[arg-type]
        page = visitor.get("/savings?days=1").text
    shown = re.search(r"Spent on ([\d,]+) requests</dt><dd>\$([\d.]+)", page)

    assert shown
    assert int(shown[1]) == ledgers.asked
    assert float(shown[2]) == pytest.approx(total["cost_usd"], abs=0.005)


@pytest.mark.slow
def test_what_measuring_a_model_cost_is_the_ledgers_too_and_is_netted_out(ledgers: Ledgers) -> None:
    body = {**entry("newcomer", ledgers.upstreams["newcomer"]), "profile": {"prompts": 6, "max_usd": 1.0}}
    job = ledgers.proxy.admin("POST", "/admin/models", body).json()["job"]
    assert wait_until(lambda: ledgers.proxy.admin("GET", f"/admin/jobs/{job}").json()["state"] == "ready")
    found = ledgers.figures()
    measuring, total = found["spending"]["profiling"], found["total"]

    assert round(measuring["usd"] * PICO) == pytest.approx(ledgers.picousd("newcomer"), abs=10)
    assert (measuring["jobs"], list(measuring["by_model"])) == (1, ["newcomer"])
    assert round(total["net_saved_usd"] * PICO) == round((total["saved_usd"] - measuring["usd"]) * PICO)
    assert "1 jobs" in ledgers.report("--since", "1h")
