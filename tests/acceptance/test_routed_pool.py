"""Route four models: one for maths, one for code, one for Chinese, and one that knows all at 100 times the price."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from router_core.validation.validation_set import ValidationPrompt
from tests.acceptance.kinds import KINDS, Library
from tests.acceptance.serving import PRICE, ServedProxy, ask
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until

SPECIALISTS = ("maths", "code", "chinese")
PROMPTS = 200
MAX_MISSED = 0.1
pytestmark = pytest.mark.timeout(300)


class Pool:
    def __init__(self, proxy: ServedProxy, library: Library, upstreams: dict[str, ScriptedUpstream]) -> None:
        self.proxy = proxy
        self.library = library
        self.upstreams = upstreams

    def answers(self, kind: str, **extra: Any) -> list[tuple[str, bool]]:
        """Return (model, was it right) for the held-back prompts of one kind."""
        replies = [(prompt, *ask(self.proxy.url, prompt, **extra)) for prompt in self.library.of_kind(kind)]
        return [(model, self.library.is_right(prompt, answer)) for prompt, model, answer in replies]

    def decision(
        self, prompt: ValidationPrompt, lambda_: float, connection: httpx.Client | None = None
    ) -> dict[str, Any]:
        """Make a dry run. Over one connection, all are made by one process."""
        body = {"model": "auto", "messages": list(prompt.messages)}
        post = connection.post if connection else httpx.post
        reply = post(f"{self.proxy.url}/v1/route", json=body, headers={"lambda": str(lambda_)}, timeout=60)
        document: dict[str, Any] = reply.raise_for_status().json()
        return document

    def routed(self, prompt: ValidationPrompt, lambda_: float, connection: httpx.Client) -> str:
        body = {"model": "auto", "messages": list(prompt.messages)}
        url = f"{self.proxy.url}/v1/chat/completions"
        reply = connection.post(url, json=body, headers={"lambda": str(lambda_)}, timeout=60)
        return str(reply.raise_for_status().json()["model"])

    def chosen(self, prompt: ValidationPrompt, times: int) -> set[str]:
        """Return the models that answer one prompt at λ = 0.4, over so many connections."""
        return {ask(self.proxy.url, prompt, extra_headers={"lambda": "0.4"})[0] for _ in range(times)}

    def flips_hold(self, prompt: ValidationPrompt, lambda_: float, connection: httpx.Client) -> bool:
        """Tell whether each candidate is the choice at the λ that the decision gives for it."""
        decision = self.decision(prompt, lambda_, connection)
        flips = {row["model"]: row["flips_at_lambda"] for row in decision["candidates"]}
        thresholds = {model: flip for model, flip in flips.items() if flip is not None}
        chosen = {model: self.decision(prompt, flip, connection)["model"] for model, flip in thresholds.items()}
        return (
            flips[decision["model"]] == lambda_
            and "dear" in thresholds
            and chosen == {model: model for model in thresholds}
        )


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Pool]:
    library = Library.open()
    skills = {kind: library.skill(kind) for kind in SPECIALISTS} | {"dear": library.skill()}
    upstreams = {name: ScriptedUpstream(skill).start() for name, skill in skills.items()}
    folder = tmp_path_factory.mktemp("pool")
    with ServedProxy(folder, embedder_cache, {"model_list": []}, {"MODEL_API_KEY": "sk-arm"}) as proxy:
        jobs = [
            proxy.add(name, upstream.url, 100 * PRICE if name == "dear" else PRICE, PROMPTS)
            for name, upstream in upstreams.items()
        ]
        for job in jobs:
            ended = proxy.wait_for(job)
            assert (ended["state"], ended["done"], ended["error"]) == ("ready", PROMPTS, None), ended
        yield Pool(proxy, library, upstreams)
    for upstream in upstreams.values():
        upstream.stop()


@pytest.mark.parametrize("kind", SPECIALISTS)
def test_at_lambda_zero_prompts_go_to_a_model_that_answers_them(pool: Pool, kind: str) -> None:
    answers = pool.answers(kind, extra_headers={"lambda": "0"})
    assert len(answers) >= 20
    assert sum(not right for _, right in answers) <= MAX_MISSED * len(answers)


@pytest.mark.parametrize("kind", SPECIALISTS)
def test_at_a_higher_lambda_the_expensive_model_gets_no_request_and_answers_stay_right(pool: Pool, kind: str) -> None:
    answers = pool.answers(kind, extra_headers={"lambda": "0.4"})
    assert all(model != "dear" for model, _ in answers)
    assert sum(not right for _, right in answers) <= MAX_MISSED * len(answers)


def test_the_lambda_of_one_request_moves_that_request_alone(pool: Pool) -> None:
    prompt = next(p for p in pool.library.held_back if p.family not in set().union(*KINDS.values()))
    assert ask(pool.proxy.url, prompt, extra_headers={"lambda": "0"})[0] == "dear"
    assert ask(pool.proxy.url, prompt, extra_headers={"lambda": "5"})[0] != "dear"
    assert ask(pool.proxy.url, prompt, extra_headers={"lambda": "0"})[0] == "dear"


@pytest.mark.parametrize("lambda_", [0.0, 0.1, 0.4])
def test_the_dry_run_predicts_what_then_happens(pool: Pool, lambda_: float) -> None:
    """Over one connection, so by one process: each learns the cost of responses from its own traffic."""
    prompts = [prompt for kind in SPECIALISTS for prompt in pool.library.of_kind(kind, most=4)]
    with httpx.Client() as connection:
        pairs = [
            (pool.decision(prompt, lambda_, connection)["model"], pool.routed(prompt, lambda_, connection))
            for prompt in prompts
        ]
    assert [served for _, served in pairs] == [predicted for predicted, _ in pairs]


def test_a_decision_says_at_which_lambda_it_would_flip(pool: Pool) -> None:
    """Exactly, once the answers of the requests before have found their way into the expected costs."""
    prompt = pool.library.of_kind("maths")[0]
    with httpx.Client() as connection:
        assert wait_until(lambda: pool.flips_hold(prompt, 0.4, connection))


def test_a_price_set_by_an_administrator_is_used_by_every_process(pool: Pool) -> None:
    prompt = pool.library.of_kind("code")[0]
    before = pool.decision(prompt, 0.4)["model"]
    price = {"input_cost_per_token": 1.0, "output_cost_per_token": 1.0}
    try:
        assert pool.proxy.admin("PUT", f"/admin/models/{before}/pricing", price).status_code == 200
        assert wait_until(lambda: before not in pool.chosen(prompt, times=20))
    finally:
        price = {"input_cost_per_token": PRICE, "output_cost_per_token": 4 * PRICE}
        pool.proxy.admin("PUT", f"/admin/models/{before}/pricing", price)
    assert wait_until(lambda: pool.chosen(prompt, times=20) == {before})


def test_a_fifth_model_is_added_under_traffic_and_gets_its_kind_of_prompts_on_every_process(pool: Pool) -> None:
    newcomers = pool.library.of_kind("spanish")
    failures: list[str] = []
    stop = threading.Event()
    traffic = threading.Thread(target=_traffic, args=(pool, stop, failures))
    traffic.start()
    try:
        with ScriptedUpstream(pool.library.skill("spanish")) as fifth:
            job = pool.proxy.wait_for(pool.proxy.add("spanish", fifth.url, PRICE, PROMPTS))
            assert job["state"] == "ready"
            assert wait_until(lambda: pool.chosen(newcomers[0], times=20) == {"spanish"})
            chosen = [ask(pool.proxy.url, prompt, extra_headers={"lambda": "0.4"})[0] for prompt in newcomers]
            assert chosen.count("spanish") >= 0.9 * len(chosen)
            stop.set()
            traffic.join()
            assert pool.proxy.admin("DELETE", "/admin/models/spanish").status_code in (200, 204)
    finally:
        stop.set()
        traffic.join()
    assert failures == []


def _traffic(pool: Pool, stop: threading.Event, failures: list[str]) -> None:
    """Send twenty requests a second until the event is set, for a minute at most."""
    prompts = [prompt for kind in SPECIALISTS for prompt in pool.library.of_kind(kind)]
    with httpx.Client(base_url=pool.proxy.url, timeout=60) as client:
        for turn in range(1200):
            if stop.wait(0.05):
                return
            body = {"model": "auto", "messages": list(prompts[turn % len(prompts)].messages)}
            reply = client.post("/v1/chat/completions", json=body)
            if reply.status_code != 200:
                failures.append(f"{reply.status_code}: {reply.text[:200]}")
