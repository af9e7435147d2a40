from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from proxy.server.request_log import MAX_CANDIDATES, Costs, decision_detail, with_earlier_turn_cached
from proxy.storage.usage import TokenCounts
from tests.bench.decision_records import Context, a_selection
from tests.server.conftest import Fleet, open_fleet
from tests.support.keyed_proxy import ASK, KeyedProxy
from tests.support.proxy_process import NO_COOLDOWN, ProxyProcess
from tests.support.scripted_answers import Step
from tests.support.waiting import wait_until

SECRET_WORDS = "the heron on the weir"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Fleet]:
    with open_fleet(tmp_path_factory.mktemp("decisions"), embedder_cache, breaker=NO_COOLDOWN) as opened:
        yield opened


@pytest.fixture
def fleet(recorded: Fleet) -> Fleet:
    for upstream in (recorded.fair, recorded.good):
        upstream.reset()
    return recorded


def ask(fleet: Fleet, *, model: str = "auto", path: str = "chat/completions", **more: Any) -> httpx.Response:
    headers = more.pop("headers", {})
    body = {"model": model, "messages": [{"role": "user", "content": SECRET_WORDS}], **more}
    return httpx.post(f"{fleet.base_url}/{path}", json=body, headers=headers, timeout=60)


def decision_of(fleet: Fleet, reply: httpx.Response) -> dict[str, Any]:
    """Return the record of the decision behind an answer, which is there within a second."""
    path = f"/admin/decisions/{reply.headers['x-uniroute-decision']}"
    assert wait_until(lambda: fleet.proxy.admin("GET", path).status_code == 200)
    found: dict[str, Any] = fleet.proxy.admin("GET", path).json()
    return found


def listed(fleet: Fleet, query: str) -> list[str]:
    return [row["id"] for row in fleet.proxy.admin("GET", f"/admin/decisions?{query}").json()["decisions"]]


def test_a_decision_says_what_was_chosen_and_why(fleet: Fleet) -> None:
    reply = ask(fleet, headers={"x-request-id": "req-7"})
    kept = decision_of(fleet, reply)

    shown = {name: kept[name] for name in ("request", "api", "requested", "model", "reason", "ending", "lambda")}
    assert shown == {
        "request": "req-7",
        "api": "chat",
        "requested": "auto",
        "model": "fair",
        "reason": "scored",
        "ending": "complete",
        "lambda": 0.1,
    }
    assert [(row["model"], round(row["expected_error"], 3)) for row in kept["candidates"]] == [
        ("fair", 0.3),
        ("good", 0.1),
    ]
    assert 0 < kept["candidates"][1]["flips_at_lambda"] < 0.1
    assert sum(cluster["weight"] for cluster in kept["clusters"]) == pytest.approx(1, abs=1e-5)


def test_a_decision_says_how_the_run_of_an_agent_went(fleet: Fleet) -> None:
    """Four failed turns of "fair" are stuck by 0.68, which makes 0.75 · 0.68 · 0.7 = 0.36 more errors of it."""
    tools = [{"name": "Bash", "input_schema": {"type": "object"}}]
    messages: list[Any] = [{"role": "user", "content": SECRET_WORDS}]
    for number in range(4):
        function = {"name": "Bash", "arguments": f'{{"command": "pytest -k {number}"}}'}
        call = {"id": f"toolu_9pw1qnYScq{number}", "type": "function", "function": function}
        fleet.fair.then(Step(message={"role": "assistant", "tool_calls": [call]}, finish_reason="tool_calls"))
        answer = ask(fleet, path="messages", messages=messages, tools=tools, max_tokens=100).json()
        result = {"type": "tool_result", "tool_use_id": call["id"], "is_error": True, "content": f"no, {number}"}
        messages += [{"role": "assistant", "content": answer["content"]}, {"role": "user", "content": [result]}]
    done = ask(fleet, path="messages", messages=messages, tools=tools, max_tokens=100)
    messages += [{"role": "assistant", "content": done.json()["content"]}, {"role": "user", "content": "Go on."}]
    reply = ask(fleet, path="messages", messages=messages, tools=tools, max_tokens=100)
    kept = decision_of(fleet, reply)

    assert done.headers["x-uniroute-model"] == "fair"
    assert reply.headers["x-uniroute-model"] == "good"
    assert kept["trajectory"] == {
        "stuck": pytest.approx(0.6799, abs=1e-3),
        "failed": pytest.approx(0.7599),
        "repeated": 0,
        "reverted": 0,
        "turns": 4,
    }
    added = {row["model"]: (row["expected_error"], row["trajectory_error"]) for row in kept["candidates"]}
    assert added == {
        "good": (pytest.approx(0.1), 0),
        "fair": (pytest.approx(0.657, abs=1e-3), pytest.approx(0.357, abs=1e-3)),
    }


def test_a_decision_has_attempts_times_usage_and_cost(fleet: Fleet) -> None:
    fleet.fair.then(Step(status=500))
    kept = decision_of(fleet, ask(fleet))
    times = kept["times"]

    assert [(each["model"], each["outcome"], each["status"]) for each in kept["attempts"]] == [
        ("fair", "failed", "500"),
        ("good", "complete", None),
    ]
    assert 0 < times["chosen_s"] <= times["asked_s"] < kept["attempts"][1]["started_s"] < times["ended_s"]
    assert (kept["model"], kept["reason"]) == ("good", "fallback")
    assert kept["cost_usd"] > 0


def test_a_prompt_far_from_all_clusters_is_novel_in_the_dry_run_the_record_and_the_metrics(fleet: Fleet) -> None:
    known = "Write a function in Python that returns the sum of a list of integers."
    dry = {words: route(fleet, words) for words in (SECRET_WORDS, known)}
    before = novel_prompts(fleet)
    kept = [decision_of(fleet, ask(fleet, messages=[{"role": "user", "content": words}])) for words in dry]

    assert [each["novel"] for each in (*dry.values(), *kept)] == [True, False, True, False]
    assert [each["nearest_cosine"] for each in kept] == [each["nearest_cosine"] for each in dry.values()]
    assert kept[0]["nearest_cosine"] < 0.353 < kept[1]["nearest_cosine"]
    assert novel_prompts(fleet) == before + 1


def route(fleet: Fleet, words: str, model: str = "auto") -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": words}]}
    found: dict[str, Any] = httpx.post(f"{fleet.base_url}/route", json=body, timeout=60).json()
    return found


def novel_prompts(fleet: Fleet) -> float:
    page = fleet.proxy.admin("GET", "/metrics").text
    return float(re.findall(r"^uniroute_novel_prompts_total (.*)$", page, re.MULTILINE)[0])


def test_without_an_assignment_it_is_not_known_whether_a_prompt_is_novel(fleet: Fleet) -> None:
    kept = decision_of(fleet, ask(fleet, model="fair"))
    assert (kept["novel"], kept["nearest_cosine"]) == (None, None)


def test_no_word_of_a_prompt_or_an_answer_is_kept(fleet: Fleet) -> None:
    kept = decision_of(fleet, ask(fleet))

    assert kept["prompt"] is None
    assert SECRET_WORDS not in json.dumps(kept)
    assert "The fair answer." not in json.dumps(kept)


def test_prompts_are_kept_where_the_setting_says_so(tmp_path: Path, embedder_cache: Path) -> None:
    with open_fleet(tmp_path, embedder_cache, log_prompts=True) as fleet:
        assert decision_of(fleet, ask(fleet))["prompt"] == SECRET_WORDS


def test_half_a_character_in_a_reason_breaks_no_record() -> None:
    ctx: Any = Context(models=20)
    selection = replace(a_selection(ctx, None), degraded_reason="half \ud800")
    kept = json.loads(decision_detail(ctx, selection, [], Costs(None, None, None, None)))

    assert kept["degraded"] == "half \ud800"
    assert len(kept["candidates"]["models"]) == MAX_CANDIDATES
    assert kept["unlisted"] == 20 - MAX_CANDIDATES


def test_a_model_that_was_ruled_out_is_named_with_its_reason(fleet: Fleet) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    kept = decision_of(fleet, ask(fleet, messages=[{"role": "user", "content": [image]}]))
    (out,) = kept["ineligible"]

    assert out["model"] == "fair"
    assert "images" in out["why"]


def test_savings_are_against_what_was_asked_for_by_name_or_else_the_best_single_model(fleet: Fleet) -> None:
    routed, pinned = decision_of(fleet, ask(fleet)), decision_of(fleet, ask(fleet, model="fair"))

    assert (routed["model"], routed["baseline"]["model"]) == ("fair", "good")
    assert routed["saved_usd"] == pytest.approx(routed["baseline"]["cost_usd"] - routed["cost_usd"])
    assert routed["baseline"]["cost_usd"] == pytest.approx(100 * routed["cost_usd"])
    assert (pinned["baseline"]["model"], pinned["saved_usd"]) == ("fair", 0)


def test_the_baseline_is_taken_to_have_the_earlier_turn_in_its_cache() -> None:
    counts = TokenCounts(prompt_tokens=1000, cached_tokens=100, output_tokens=5)

    assert with_earlier_turn_cached(counts, 700) == replace(counts, cached_tokens=700)
    assert with_earlier_turn_cached(counts, 50) == counts
    assert with_earlier_turn_cached(counts, 5000) == replace(counts, cached_tokens=1000)
    assert with_earlier_turn_cached(TokenCounts(), 700) == TokenCounts()


def test_within_a_session_the_baselines_cache_makes_it_cheaper(tmp_path: Path, embedder_cache: Path) -> None:
    with open_fleet(tmp_path, embedder_cache, info={"cache_read_input_token_cost": 1e-9}) as fleet:
        usage = {"prompt_tokens": 1000, "completion_tokens": 1, "total_tokens": 1001}
        fleet.fair.always = Step(usage=usage)
        alone, first, second = (
            decision_of(fleet, ask(fleet, uniroute={"session": session})) for session in (None, "s", "s")
        )

    assert {each["model"] for each in (alone, first, second)} == {"fair"}
    assert first["baseline"]["cost_usd"] == pytest.approx(alone["baseline"]["cost_usd"])
    assert second["baseline"]["cost_usd"] < alone["baseline"]["cost_usd"] / 10
    assert second["cost_usd"] == pytest.approx(first["cost_usd"])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("messages", {"max_tokens": 50}),
        ("responses", {"input": SECRET_WORDS, "messages": None}),
        ("completions", {"prompt": SECRET_WORDS, "messages": None}),
    ],
)
def test_requests_of_every_api_are_recorded(fleet: Fleet, path: str, body: dict[str, Any]) -> None:
    sent = {name: value for name, value in {"messages": [{"role": "user", "content": "hi"}], **body}.items() if value}
    reply = httpx.post(f"{fleet.base_url}/{path}", json={"model": "auto", **sent}, timeout=60)
    assert decision_of(fleet, reply)["api"] == path


def test_decisions_are_listed_newest_first_page_by_page(fleet: Fleet) -> None:
    asked = [decision_of(fleet, ask(fleet))["id"] for _ in range(3)]
    first = fleet.proxy.admin("GET", "/admin/decisions?limit=2").json()
    second = fleet.proxy.admin("GET", f"/admin/decisions?limit=1&cursor={first['next']}").json()

    assert [row["id"] for row in (*first["decisions"], *second["decisions"])] == asked[::-1]
    assert "candidates" not in first["decisions"][0]


def test_decisions_are_filtered(fleet: Fleet) -> None:
    fair = decision_of(fleet, ask(fleet, headers={"x-uniroute-tags": "blue, green"}))
    good = decision_of(fleet, ask(fleet, model="good"))

    assert listed(fleet, "model=good")[0] == good["id"]
    assert listed(fleet, "tag=green") == [fair["id"]]
    assert good["id"] not in listed(fleet, "reason=scored")
    assert listed(fleet, "ending=failed&key=nobody") == []
    assert fair["id"] not in listed(fleet, f"since={good['received_at'].replace('+', '%2B')}")


def test_decisions_are_exported_whole_one_a_line(fleet: Fleet) -> None:
    kept = decision_of(fleet, ask(fleet))
    reply = fleet.proxy.admin("GET", "/admin/decisions?format=jsonl&limit=1")

    assert [json.loads(line) for line in reply.text.splitlines()] == [kept]
    assert reply.headers["x-uniroute-next"].endswith(kept["id"])


def test_an_unknown_decision_is_a_404_and_a_broken_cursor_a_400(fleet: Fleet) -> None:
    missing, broken = (fleet.proxy.admin("GET", f"/admin/decisions{rest}") for rest in ("/dec-0", "?cursor=x"))

    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "decision_not_found")
    assert (broken.status_code, broken.json()["error"]["param"]) == (400, "cursor")


@pytest.mark.parametrize("query", ["limit=0", "since=yesterday", "until=2026-01-01T00:00:00", "format=csv", "model="])
def test_a_wrong_query_is_a_400(fleet: Fleet, query: str) -> None:
    assert fleet.proxy.admin("GET", f"/admin/decisions?{query}").status_code == 400


def test_no_decision_is_kept_where_the_setting_says_so(tmp_path: Path, embedder_cache: Path) -> None:
    with open_fleet(tmp_path, embedder_cache, decision_ttl_s=0) as fleet:
        assert ask(fleet).status_code == 200
        fleet.proxy.stop()
        with fleet.proxy.__class__(fleet.proxy.folder, embedder_cache, {"model_list": []}) as again:
            assert again.admin("GET", "/admin/decisions").json() == {"decisions": [], "next": None}


def test_tags_come_from_the_field_the_header_and_the_metadata(fleet: Fleet) -> None:
    more: dict[str, Any] = {
        "uniroute": {"tags": ["own", "own"]},
        "metadata": {"tags": ["a,b", "theirs", 5], "user": "u-1"},
    }
    kept = decision_of(fleet, ask(fleet, headers={"x-uniroute-tags": "team-7 ,, batch"}, **more))
    text = decision_of(fleet, ask(fleet, metadata={"tags": "x, y"}))

    assert kept["tags"] == ["own", "team-7", "batch", "theirs"]
    assert text["tags"] == ["x", "y"]


@pytest.mark.parametrize(
    ("tags", "header"),
    [("blue", ""), (["a,b"], ""), ([""], ""), (["x" * 65], ""), ([f"t{n}" for n in range(17)], ""), ([], "x" * 65)],
)
def test_a_tag_that_cannot_be_one_is_a_400(fleet: Fleet, tags: Any, header: str) -> None:
    reply = ask(fleet, headers={"x-uniroute-tags": header}, uniroute={"tags": tags})
    assert (reply.status_code, "tags" in reply.json()["error"]["param"]) == (400, True)


def test_tags_are_in_no_metric(fleet: Fleet) -> None:
    decision_of(fleet, ask(fleet, headers={"x-uniroute-tags": "never-a-label"}))
    assert "never-a-label" not in fleet.proxy.admin("GET", "/metrics").text


def test_the_tags_of_a_key_come_first_and_sixteen_are_kept(keyed_proxy: KeyedProxy) -> None:
    key = keyed_proxy.make(tags=["team", "eu"])
    stated = ",".join(f"t{number}" for number in range(16))
    body = {"model": "auto", "messages": ASK}
    reply = keyed_proxy.call(key, "POST", "/v1/chat/completions", body, **{"x-uniroute-tags": stated})
    path = f"/admin/decisions/{reply.headers['x-uniroute-decision']}"
    assert wait_until(lambda: keyed_proxy.proxy.admin("GET", path).status_code == 200)
    kept = keyed_proxy.proxy.admin("GET", path).json()

    assert kept["tags"] == ["team", "eu", *(f"t{number}" for number in range(14))]
    assert kept["key"] == key.id


def test_a_viewer_reads_decisions_and_a_client_does_not(keyed_proxy: KeyedProxy) -> None:
    viewer, client = keyed_proxy.make(role="viewer"), keyed_proxy.make()
    statuses = [keyed_proxy.call(key, "GET", "/admin/decisions").status_code for key in (viewer, client)]
    assert statuses == [200, 403]


def test_the_tags_of_a_key_can_be_changed_and_are_checked(keyed_proxy: KeyedProxy) -> None:
    key = keyed_proxy.make(tags=["team"])
    path = f"/admin/keys/{key.id}"
    changed = keyed_proxy.proxy.admin("PATCH", path, {"tags": None})
    refused = [keyed_proxy.proxy.admin("PATCH", path, {"tags": tags}) for tags in ("team", ["a,b"], ["x"] * 3 + [5])]

    assert changed.json()["tags"] == []
    assert [(reply.status_code, reply.json()["error"]["param"]) for reply in refused] == [(400, "tags")] * 3


def test_a_decision_survives_the_death_of_the_process_that_made_it(tmp_path: Path, embedder_cache: Path) -> None:
    with open_fleet(tmp_path, embedder_cache) as fleet:
        path = f"/admin/decisions/{ask(fleet).headers['x-uniroute-decision']}"
        fleet.proxy.stop(signal.SIGKILL)
        with ProxyProcess(fleet.proxy.folder, embedder_cache, {"model_list": []}) as again:
            assert wait_until(lambda: again.admin("GET", path).status_code == 200)
