from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import pytest

from proxy.profiling.job_store import Job
from proxy.server.spending import profiling_costs
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


def spending(fleet: Fleet, **query: Any) -> dict[str, Any]:
    asked = "&".join(f"{name}={value}" for name, value in query.items())
    found: dict[str, Any] = fleet.proxy.admin("GET", f"/admin/spending?{asked}").json()
    return found


def test_todays_requests_are_summed_whether_their_decisions_are_kept_or_not(fleet: Fleet, http: Any) -> None:
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    before = spending(fleet)["days"].get(today, {"requests": 0, "cost_usd": 0.0})
    http.post("/v1/chat/completions", json={"model": "good", "messages": [{"role": "user", "content": "Hi"}]})

    def counted() -> bool:
        return bool(spending(fleet)["days"].get(today, {}).get("requests", 0) > before["requests"])

    assert wait_until(counted)
    assert spending(fleet)["days"][today]["cost_usd"] > before["cost_usd"]


def test_days_that_are_only_a_part_of_the_time_are_left_out(fleet: Fleet) -> None:
    now = time.time()
    assert spending(fleet, since=now - 60, until=now - 30)["days"] == {}


@pytest.mark.parametrize(("role", "status"), [("viewer", 200), ("client", 403)])
def test_a_viewer_may_read_it_and_a_client_may_not(keyed_proxy: KeyedProxy, role: str, status: int) -> None:
    key = keyed_proxy.make(role=role)
    assert keyed_proxy.call(key, "GET", "/admin/spending").status_code == status
    assert keyed_proxy.call(None, "GET", "/admin/spending").status_code == 401


def test_a_time_that_is_none_is_a_400(fleet: Fleet) -> None:
    assert fleet.proxy.admin("GET", "/admin/spending?since=yesterday").status_code == 400
