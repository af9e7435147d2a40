from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.dashboard.site import Site
from tests.support.proxy_process import ADMIN_KEY
from tests.support.waiting import wait_until


@pytest.fixture
def decision(site: Site) -> str:
    return answered(site)


def answered(site: Site, *more: Any, **body: Any) -> str:
    """Have a request answered, and return its decision once it is kept. `more`: messages after the first."""
    headers = {
        "x-uniroute-tags": "<script>alert(1)</script>",
        "x-session-id": "one agent",
        "authorization": f"Bearer {ADMIN_KEY}",
    }
    messages = [{"role": "user", "content": "Write a haiku about rain."}, *more]
    body = {"model": "auto", "messages": messages, **body}
    reply = httpx.post(f"{site.proxy.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert reply.status_code == 200, reply.text
    made = reply.headers["x-uniroute-decision"]
    assert wait_until(lambda: site.proxy.admin("GET", f"/admin/decisions/{made}").status_code == 200)
    return made


def test_the_first_view_lists_the_last_decisions(site: Site, decision: str) -> None:
    with site.visitor() as visitor:
        assert f"/decision?id={decision}" in visitor.get(site.url).text


def test_a_decision_shows_every_candidate_the_steps_and_the_attempts(site: Site, decision: str) -> None:
    with site.visitor(site.make_key("viewer")["key"]) as visitor:
        page = visitor.get(f"/decision?id={decision}").text

    assert all(name in page for name in ("large", "medium", "small", "coder-7b"))
    assert all(step in page for step in ("received", "chosen", "was asked", "Wins at λ"))


def test_a_decision_says_how_far_the_run_of_an_agent_was_stuck(site: Site, decision: str) -> None:
    del decision  # the newest answer of the session
    run: list[Any] = []
    for number in range(3):
        function = {"name": "bash", "arguments": f'{{"command": "pytest -k {number}"}}'}
        run.append(
            {"role": "assistant", "tool_calls": [{"id": f"c{number}", "type": "function", "function": function}]}
        )
        run.append({"role": "tool", "tool_call_id": f"c{number}", "content": "Exit code 1\nno"})
    done = [{"role": "assistant", "content": "I have done what I could."}, {"role": "user", "content": "Go on."}]
    tools = [{"type": "function", "function": {"name": "bash", "parameters": {"type": "object"}}}]
    with site.visitor() as visitor:
        page = visitor.get(f"/decision?id={answered(site, *run, *done, tools=tools)}").text

    assert "Over 3 turns the run of the agent was stuck by 0.54: failed 0.66" in page
    assert "of it for the trajectory" in page


def test_what_a_client_has_written_is_escaped(site: Site, decision: str) -> None:
    with site.visitor() as visitor:
        page = visitor.get(f"/decision?id={decision}").text

    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_an_unknown_decision_is_not_found(site: Site) -> None:
    with site.visitor() as visitor:
        assert visitor.get("/decision?id=dec-0").status_code == 404


def test_savings_are_shown_by_each_grouping_and_escaped(site: Site, decision: str) -> None:
    with site.visitor(site.make_key("viewer")["key"]) as visitor:
        by_model = visitor.get("/savings").text
        by_tag = visitor.get("/savings?by=tag&days=1").text
        odd = visitor.get("/savings?by=<b>&days=x").text

    assert "requests are compared with their baseline" in by_model
    assert "By model" in odd
    assert "&lt;script&gt;alert" in by_tag
    assert "<script>alert" not in by_tag
