from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Any, cast

import httpx
import pytest

from proxy.errors import ServiceUnavailable
from proxy.profiling.job_store import Job
from proxy.server.reports import MAX_RUNNING, Reports, ReportWork, profiling_costs
from proxy.storage.decisions import DecisionFilter
from proxy.storage.redis import StoreUnavailable
from tests.server.conftest import Fleet
from tests.support.keyed_proxy import KeyedProxy
from tests.support.waiting import wait_until

DAY_S = 86_400


def a_job(model: str, spent_usd: float | None) -> Job:
    return Job("j", model, "ready", 1, 1, 0, 0, spent_usd, None, None)


def test_jobs_are_summed_by_model_and_by_the_day_of_their_submission() -> None:
    jobs = [(DAY_S + 5.0, a_job("a", 0.1)), (2 * DAY_S + 5.0, a_job("a", 0.2)), (2 * DAY_S + 9.0, a_job("b", None))]
    found = profiling_costs(jobs)

    assert (found["usd"], found["jobs"], found["unpriced"]) == (0.3, 3, 1)
    assert found["by_model"] == {"a": 0.3}
    assert found["by_day"] == {"1970-01-02": 0.1, "1970-01-03": 0.2}


def report(fleet: Fleet, **query: Any) -> dict[str, Any]:
    asked = "&".join(f"{name}={value}" for name, value in query.items())
    reply = fleet.proxy.admin("GET", f"/admin/report?{asked}")
    while reply.status_code == 202:
        assert reply.headers["retry-after"] == "1"
        reply = fleet.proxy.admin("GET", f"/admin/report?{asked}")
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def ask(http: httpx.Client, **more: Any) -> None:
    body = {"model": "auto", "messages": [{"role": "user", "content": "What is 2 + 2?"}], **more}
    assert http.post("/v1/chat/completions", json=body).status_code == 200


def test_the_report_sums_the_decisions_that_are_asked_for(fleet: Fleet, http: httpx.Client) -> None:
    began = time.time()
    for more in ({}, {}, {"model": "good"}):
        ask(http, **more)
    # `since` differs a little each time: a report is kept for some seconds
    assert wait_until(lambda: report(fleet, since=began - time.monotonic() / 1e9)["total"]["requests"] == 3)
    found, pinned = report(fleet, since=began), report(fleet, since=began, reason="pinned")

    assert {name: sums["requests"] for name, sums in found["by"]["model"].items()} == {"fair": 2, "good": 1}
    assert (pinned["total"]["requests"], pinned["spending"]) == (1, None)
    assert found["total"]["expected_error_low"] < found["total"]["expected_error"] < 0.35
    assert found["spending"]["profiling"]["usd"] == 0


def test_a_report_is_made_once_for_all_who_ask_within_some_seconds(fleet: Fleet, http: httpx.Client) -> None:
    ask(http)
    first = report(fleet, since=1.5)
    ask(http)
    assert report(fleet, since=1.5) == first


def test_todays_requests_are_summed_whether_their_decisions_are_kept_or_not(fleet: Fleet, http: httpx.Client) -> None:
    today, tries = f"{datetime.now(UTC):%Y-%m-%d}", iter(range(1, 10_000))

    def spent() -> dict[str, Any]:
        days = report(fleet, since=next(tries))["spending"]["days"]
        return dict(days.get(today, {"requests": 0, "cost_usd": 0.0}))

    before = spent()
    ask(http, model="good")
    assert wait_until(lambda: spent()["requests"] > before["requests"])
    assert spent()["cost_usd"] > before["cost_usd"]


def test_days_that_are_only_a_part_of_the_time_are_left_out(fleet: Fleet) -> None:
    now = time.time()
    assert report(fleet, since=now - 60, until=now - 30)["spending"]["days"] == {}


@pytest.mark.parametrize(("role", "status"), [("viewer", 200), ("client", 403)])
def test_a_viewer_may_read_it_and_a_client_may_not(keyed_proxy: KeyedProxy, role: str, status: int) -> None:
    key = keyed_proxy.make(role=role)
    assert keyed_proxy.call(key, "GET", "/admin/report").status_code == status
    assert keyed_proxy.call(None, "GET", "/admin/report").status_code == 401


def test_a_time_that_is_none_is_a_400(fleet: Fleet) -> None:
    assert fleet.proxy.admin("GET", "/admin/report?since=yesterday").status_code == 400


class Slowly:
    """Make reports that are ready when `done` is set."""

    def __init__(self) -> None:
        self.made, self.done = 0, asyncio.Event()

    async def __call__(self, _: Any, wanted: DecisionFilter, work: ReportWork) -> dict[str, Any]:
        self.made += 1
        work.decisions = 7
        await self.done.wait()
        if wanted.model == "broken":
            raise StoreUnavailable("away")
        return {"model": wanted.model}


async def test_a_report_that_takes_long_says_how_far_it_is_and_is_made_once() -> None:
    make, state = Slowly(), cast(Any, None)
    reports = Reports(make)
    early = [await reports.get(state, DecisionFilter(model="m"), 0.01) for _ in range(2)]
    make.done.set()
    late = await reports.get(state, DecisionFilter(model="m"), 5)

    assert early == [(None, 7)] * 2
    assert (late, make.made) == (({"model": "m"}, 7), 1)


async def test_too_many_reports_at_once_are_refused() -> None:
    make, state = Slowly(), cast(Any, None)
    reports = Reports(make)
    for number in range(MAX_RUNNING):
        await reports.get(state, DecisionFilter(model=f"m{number}"), 0.0)
    with pytest.raises(ServiceUnavailable):
        await reports.get(state, DecisionFilter(model="one more"), 0.0)
    make.done.set()
    await reports.get(state, DecisionFilter(model="m0"), 5)
    assert (await reports.get(state, DecisionFilter(model="one more"), 5))[0] == {"model": "one more"}


async def test_a_report_that_failed_is_made_again() -> None:
    make, state = Slowly(), cast(Any, None)
    make.done.set()
    reports = Reports(make)
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            await reports.get(state, DecisionFilter(model="broken"), 5)
    assert make.made == 2
