from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import open_fleet
from tests.support.keyed_proxy import ASK, KeyedProxy, MadeKey
from tests.support.scripted_answers import Step
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[KeyedProxy]:
    folder = tmp_path_factory.mktemp("feedback")
    with (
        open_fleet(folder, embedder_cache, feedback_per_minute=300) as fleet,
        KeyedProxy(fleet.proxy) as opened,
    ):
        opened.make(name="closes the door")
        yield opened


def answered(keyed: KeyedProxy, key: MadeKey, model: str = "auto") -> str:
    reply = keyed.call(key, "POST", "/v1/chat/completions", {"model": model, "messages": ASK})
    return reply.headers["x-uniroute-decision"]


def say(keyed: KeyedProxy, key: MadeKey | None, decision: str, score: Any, **more: Any) -> httpx.Response:
    return keyed.call(key, "POST", "/v1/feedback", {"decision": decision, "score": score, **more})


def observed_of(keyed: KeyedProxy, model: str) -> dict[str, Any] | None:
    found: dict[str, Any] | None = keyed.proxy.admin("GET", f"/admin/models/{model}").json()["observed"]
    return found


def test_feedback_counts_at_once_and_stands_beside_what_was_measured(keyed: KeyedProxy) -> None:
    key = keyed.make()
    decision = answered(keyed, key, "good")
    routed = answered(keyed, key)
    pinned, reply = say(keyed, key, decision, 0), say(keyed, key, routed, 0.25, source="thumbs")
    observed = observed_of(keyed, "fair")

    assert reply.json() == {"decision": routed, "score": 0.25, "labels": 1, "why": None}
    assert (pinned.json()["labels"], pinned.json()["why"]) == (0, "the clusters of the prompt are not known")
    assert observed is not None
    assert (observed["labels"], observed["mean_error"]) == pytest.approx((1, 0.75), abs=1e-4)
    assert observed["measured_mean_error"] == pytest.approx(0.3)
    assert (observed["p"], observed["differs"]) == (None, None)
    kept = keyed.proxy.admin("GET", f"/admin/decisions/{routed}").json()
    assert (kept["score"], kept["score_source"]) == (0.25, "thumbs")
    assert say(keyed, key, routed, None).json()["labels"] == 0
    assert observed_of(keyed, "fair") is None


def test_a_key_speaks_of_its_own_decisions_and_an_admin_of_all(keyed: KeyedProxy) -> None:
    owner, other, admin, viewer = keyed.make(), keyed.make(), keyed.make(role="admin"), keyed.make(role="viewer")
    decision = answered(keyed, owner)
    statuses = [say(keyed, key, decision, 1).status_code for key in (owner, other, viewer, admin)]

    assert statuses == [200, 404, 403, 200]
    assert say(keyed, other, decision, 1).json()["error"]["code"] == "decision_not_found"
    assert keyed.proxy.admin("POST", "/v1/feedback", {"decision": decision, "score": None}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {"score": 1},
        {"decision": "dec-1"},
        {"decision": "dec-1", "score": 2},
        {"decision": "dec-1", "score": True},
        {"decision": "dec-1", "score": "1"},
        {"decision": "dec-1", "score": 1, "comment": "no words"},
        {"decision": "dec-1", "score": 1, "source": "x" * 65},
    ],
)
def test_a_wrong_body_is_a_400(keyed: KeyedProxy, body: Any) -> None:
    assert keyed.call(keyed.make(), "POST", "/v1/feedback", body).status_code == 400


def test_an_unknown_decision_is_a_404(keyed: KeyedProxy) -> None:
    assert say(keyed, keyed.make(), "dec-0", 1).status_code == 404


def test_a_failed_answer_is_no_label(tmp_path: Path, embedder_cache: Path) -> None:
    with open_fleet(tmp_path, embedder_cache, fallback_attempts=1) as fleet:
        fleet.fair.then(Step(status=500))
        reply = httpx.post(f"{fleet.base_url}/chat/completions", json={"model": "auto", "messages": ASK}, timeout=60)
        body = {"decision": reply.headers["x-uniroute-decision"], "score": 0}
        said = httpx.post(f"{fleet.base_url}/feedback", json=body, timeout=60).json()
    assert (said["labels"], said["why"]) == (0, "the answer was not whole")


def test_a_key_has_so_many_calls_in_a_minute(tmp_path: Path, embedder_cache: Path) -> None:
    with open_fleet(tmp_path, embedder_cache, feedback_per_minute=1) as fleet:
        reply = httpx.post(f"{fleet.base_url}/chat/completions", json={"model": "auto", "messages": ASK}, timeout=60)
        body = {"decision": reply.headers["x-uniroute-decision"], "score": 0}
        said = [httpx.post(f"{fleet.base_url}/feedback", json=body, timeout=60) for _ in range(2)]
    assert [each.status_code for each in said] == [200, 429]
    assert said[1].headers["retry-after"] == "60"


def test_feedback_can_be_switched_off(tmp_path: Path, embedder_cache: Path) -> None:
    with open_fleet(tmp_path, embedder_cache, feedback="off") as fleet:
        reply = httpx.post(f"{fleet.base_url}/feedback", json={"decision": "dec-1", "score": 0}, timeout=60)
    assert (reply.status_code, "off" in reply.json()["error"]["message"]) == (403, True)


@pytest.mark.parametrize(("setting", "moves"), [("observe", False), ("adapt", True)])
def test_a_setting_says_whether_feedback_moves_routing(
    tmp_path: Path, embedder_cache: Path, monkeypatch: pytest.MonkeyPatch, setting: str, moves: bool
) -> None:
    with open_fleet(tmp_path, embedder_cache, feedback=setting, feedback_labels_per_key=1000) as fleet:

        def expected_error() -> float:
            shown: Any = httpx.post(
                f"{fleet.base_url}/route", json={"model": "auto", "messages": ASK}, timeout=60
            ).json()
            return sum(float(row["expected_error"]) for row in shown["candidates"] if row["model"] == "fair")

        before = expected_error()
        for _ in range(25):
            body = {"model": "auto", "messages": ASK}
            reply = httpx.post(f"{fleet.base_url}/chat/completions", json=body, timeout=60)
            said = {"decision": reply.headers["x-uniroute-decision"], "score": 0}
            assert httpx.post(f"{fleet.base_url}/feedback", json=said, timeout=60).json()["labels"] > 0.99
        if moves:
            assert wait_until(lambda: expected_error() > before + 0.05)
        else:
            assert expected_error() == pytest.approx(before)
        found = fleet.proxy.admin("GET", "/admin/models/fair").json()["observed"]
    assert (found["differs"], found["test"]) == (True, "two-proportion z-test, two-sided")
