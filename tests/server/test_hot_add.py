from __future__ import annotations

from typing import Any

import httpx

from tests.server.conftest import Fleet
from tests.support.proxy_process import model_entry
from tests.support.scripted_answers import Step
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until

ASK: Any = [{"role": "user", "content": "What is 2 + 2?"}]
JOB_KEYS = {"id", "model", "state", "done", "total", "failed", "unlabelled", "spent_usd", "eta_s", "error"}


def job_of(fleet: Fleet, job: str) -> dict[str, Any]:
    reply = fleet.proxy.admin("GET", f"/admin/jobs/{job}")
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def ended(fleet: Fleet, job: str) -> dict[str, Any]:
    assert wait_until(lambda: job_of(fleet, job)["state"] in ("ready", "failed", "cancelled"))
    return job_of(fleet, job)


def test_an_added_model_is_profiled_and_listed(fleet: Fleet) -> None:
    with ScriptedUpstream(lambda _: "I do not know.") as upstream:
        body = {**model_entry("ignorant", upstream.url, price=1e-9), "profile": {"prompts": 24, "max_usd": 1}}
        reply = fleet.proxy.admin("POST", "/admin/models", body)
        assert (reply.status_code, reply.json()["model"]) == (202, "ignorant")
        try:
            job = ended(fleet, reply.json()["job"])
            card = fleet.proxy.admin("GET", "/admin/models/ignorant").json()
        finally:
            fleet.proxy.admin("DELETE", "/admin/models/ignorant")

    assert set(job) == JOB_KEYS
    assert (job["state"], job["done"], job["total"]) == ("ready", 24, 24)
    assert (card["state"], card["job"]["id"]) == ("ready", job["id"])
    assert card["profile"]["mean_error"] > 0.9
    assert len(upstream.history) == 24


def test_a_job_can_be_cancelled_and_an_unknown_one_is_not_found(fleet: Fleet) -> None:
    with ScriptedUpstream() as upstream:
        upstream.always = Step(hang=True)
        added = fleet.proxy.admin("POST", "/admin/models", model_entry("silent", upstream.url))
        job = added.json()["job"]
        assert wait_until(lambda: bool(upstream.history))
        cancelled = fleet.proxy.admin("DELETE", f"/admin/jobs/{job}").json()
        again = fleet.proxy.admin("POST", "/admin/models/silent/profile", {})
        fleet.proxy.admin("DELETE", f"/admin/jobs/{again.json()['job']}")
        fleet.proxy.admin("DELETE", "/admin/models/silent")

    assert cancelled["state"] == "cancelled"
    assert (again.status_code, again.json()["job"] != job) == (202, True)
    missing = fleet.proxy.admin("GET", "/admin/jobs/nobody")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "job_not_found")


def test_the_old_profile_serves_while_the_model_is_profiled_again(fleet: Fleet) -> None:
    fleet.fair.always = Step(hang=True)
    before = fleet.proxy.admin("GET", "/admin/models/fair").json()["profile"]["mean_error"]
    job = fleet.proxy.admin("POST", "/admin/models/fair/profile", {"prompts": 5}).json()["job"]
    assert wait_until(lambda: len(fleet.fair.history) > 0)
    fleet.fair.always = None
    reply = httpx.post(f"{fleet.base_url}/chat/completions", json={"model": "auto", "messages": ASK}, timeout=60)
    state = fleet.proxy.admin("GET", "/admin/models/fair").json()["state"]
    fleet.proxy.admin("DELETE", f"/admin/jobs/{job}")

    assert (reply.headers["x-uniroute-model"], state) == ("fair", "ready")
    assert fleet.proxy.admin("GET", "/admin/models/fair").json()["profile"]["mean_error"] == before
