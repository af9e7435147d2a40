"""Send fifty concurrent requests at a limit, over two servers with one Redis, for each way to request a size.

The model uses all that a request allows. `pytest -s` prints what was spent of each limit.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from proxy.storage.valkey import EmbeddedValkey
from tests.support.limited_keys import LimitedKey
from tests.support.proxy_process import ProxyProcess, model_entry
from tests.support.scripted_answers import Step
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until

ASK: Any = [{"role": "user", "content": "What is 2 + 2?"}]
CONCURRENCY = 50
PROMPT_TOKENS = 7
# What the model takes of each request, answers and reasoning together.
OUTPUT_TOKENS = 100
# USD per prompt token; four times that per token of an answer.
PRICE = 1e-5
COST = (PROMPT_TOKENS + 4 * OUTPUT_TOKENS) * PRICE
BUDGET = 0.05
TOKENS_PER_MINUTE = 1000
# What is set aside for an answer of no stated length.
UNSTATED_TOKENS = 60
BEYOND_USD = 4 * PRICE * (OUTPUT_TOKENS - UNSTATED_TOKENS)
pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class RequestedSize:
    """Request a size in one way, for which the model takes all of OUTPUT_TOKENS."""

    body: dict[str, Any]
    model: str = "arm"
    beyond_usd: float = 0.0
    """What each answer may cost more than is set aside for it."""


def _thinking(**more: Any) -> dict[str, Any]:
    return {"max_tokens": 20, **more}


SIZES = {
    "max_tokens": RequestedSize({"max_tokens": 100}),
    "max_completion_tokens": RequestedSize({"max_completion_tokens": 100}),
    "both names": RequestedSize({"max_completion_tokens": 100, "max_tokens": 100}),
    "max_output_tokens": RequestedSize({"max_tokens": 1, "max_output_tokens": 100}),
    "max_new_tokens": RequestedSize({"max_tokens": 1, "max_new_tokens": "100"}),
    "num_predict": RequestedSize({"max_tokens": 1, "options": {"num_predict": 100}}),
    "maxOutputTokens": RequestedSize({"max_tokens": 1, "generationConfig": {"maxOutputTokens": 100}}),
    "extra_body": RequestedSize({"max_tokens": 1, "extra_body": {"max_tokens": 100}}),
    "n": RequestedSize({"max_tokens": 25, "n": 4}),
    "best_of": RequestedSize({"max_tokens": 25, "best_of": 4}),
    "candidateCount": RequestedSize({"max_tokens": 25, "generation_config": {"candidateCount": 4}}),
    "reasoning_effort": RequestedSize({"max_tokens": 100, "reasoning_effort": "high"}),
    "thinking.budget_tokens": RequestedSize(_thinking(thinking={"type": "enabled", "budget_tokens": 80})),
    "reasoning.max_tokens": RequestedSize(_thinking(reasoning={"max_tokens": 80})),
    "thinking_budget": RequestedSize(_thinking(thinking_budget=80)),
    "prediction": RequestedSize(_thinking(prediction={"type": "content", "content": "x" * 320})),
    "audio": RequestedSize(
        {"max_tokens": 100, "modalities": ["text", "audio"], "audio": {"voice": "a", "format": "wav"}}
    ),
    "an arm's own limit": RequestedSize({}, model="fixed"),
    "a cap that is lowered": RequestedSize({"max_tokens": 64_000, "models": ["bounded"]}, model="auto"),
    "no statement": RequestedSize({}, beyond_usd=BEYOND_USD),
    "a name that is not heeded": RequestedSize({"max_new_tokens": 1}, beyond_usd=BEYOND_USD),
}
QUICK = ("max_completion_tokens", "num_predict", "no statement")
EACH_SIZE = [
    pytest.param(name, stream, marks=() if name in QUICK and stream == (name == QUICK[0]) else pytest.mark.slow)
    for name in SIZES
    for stream in (False, True)
]


@dataclass(frozen=True)
class Race:
    key: LimitedKey
    replies: list[tuple[int, str]]
    lasted_s: float


@dataclass(frozen=True)
class Servers:
    proxies: tuple[ProxyProcess, ProxyProcess]
    upstream: ScriptedUpstream
    store: redis.Redis
    client: httpx.Client
    table: list[str]

    def key(self, **limits: Any) -> LimitedKey:
        """Make a key that both servers know; they ask for keys once they know of the first."""
        key = LimitedKey.put(self.store, **limits)
        for proxy in self.proxies:
            list_models = partial(self.client.get, f"{proxy.url}/v1/models")
            headers = {"authorization": f"Bearer {key.secret}"}
            assert wait_until(lambda list_models=list_models: list_models().status_code == 401)
            assert wait_until(
                lambda list_models=list_models, headers=headers: list_models(headers=headers).status_code == 200
            )
        return key

    def race(self, size: RequestedSize, *, stream: bool, **limits: Any) -> Race:
        """Repeat the race until Redis answered in time for each request, which may fail on a busy machine."""
        for _ in range(20):
            before = self.unchecked()
            key, started = self.key(**limits), time.monotonic()
            replies = self._race(key, size, stream=stream)
            race = Race(key, replies, time.monotonic() - started)
            if self.unchecked() == before:
                break
        return race

    def unchecked(self) -> float:
        """Count requests that were judged without Redis."""
        text = "".join(proxy.admin("GET", "/metrics").text for proxy in self.proxies)
        lines = [line for line in text.splitlines() if line.startswith("uniroute_limits_unchecked_total{")]
        return sum(float(line.split()[-1]) for line in lines)

    def _race(self, key: LimitedKey, size: RequestedSize, *, stream: bool) -> list[tuple[int, str]]:
        """Return status and code of each reply, once all reservations are settled."""
        body = {"model": size.model, "messages": ASK, "stream": stream, **size.body}
        headers = {"authorization": f"Bearer {key.secret}"}

        def ask(number: int) -> tuple[int, str]:
            url = f"{self.proxies[number % 2].url}/v1/chat/completions"
            reply = self.client.post(url, json=body, headers=headers)
            return reply.status_code, "" if reply.status_code == 200 else reply.json()["error"]["code"]

        with ThreadPoolExecutor(CONCURRENCY) as clients:
            replies = list(clients.map(ask, range(CONCURRENCY)))
        assert wait_until(lambda: key.open == 0)
        return replies


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("sizes")
    server = EmbeddedValkey(folder / "redis")
    server.ensure()
    environ = {"MODEL_API_KEY": "sk-x", "UNIROUTE_REDIS_URL": f"unix://{server.socket_path}"}
    with ScriptedUpstream() as upstream, redis.Redis(unix_socket_path=str(server.socket_path)) as store:
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": OUTPUT_TOKENS}
        upstream.always = Step(usage={**usage, "total_tokens": PROMPT_TOKENS + OUTPUT_TOKENS}, delay_s=0.05)
        able = {f"supports_{ability}": True for ability in ("reasoning", "audio_output")}
        fixed = model_entry("fixed", upstream.url, price=PRICE)
        fixed["litellm_params"] |= {"extra_body": {"max_completion_tokens": OUTPUT_TOKENS}}
        bounded = model_entry("bounded", upstream.url, price=PRICE, max_output_tokens=OUTPUT_TOKENS)
        config = {
            "model_list": [model_entry("arm", upstream.url, price=PRICE, **able), fixed, bounded],
            "uniroute": {
                "profile": {"on_start": False},
                "limits_timeout_s": 1.0,
                "reserve_output_tokens": UNSTATED_TOKENS,
            },
        }
        with (
            ProxyProcess(folder / "first", embedder_cache, config, environ) as first,
            ProxyProcess(folder / "second", embedder_cache, config, environ) as second,
            httpx.Client(timeout=60, limits=httpx.Limits(max_connections=CONCURRENCY)) as client,
        ):
            first.put_profile("bounded", 0.1)
            measured = partial(client.post, f"{second.url}/v1/route", json={"model": "auto", "messages": ASK})
            assert wait_until(lambda: measured().status_code == 200)
            table: list[str] = []
            yield Servers((first, second), upstream, store, client, table)
            sys.stdout.write("\n" + "\n".join(table) + "\n")
    server.stop()


@pytest.mark.parametrize(("name", "stream"), EACH_SIZE)
def test_a_budget_is_exceeded_by_no_more_than_documented(servers: Servers, name: str, *, stream: bool) -> None:
    size = SIZES[name]
    race = servers.race(size, stream=stream, usd_per_day=BUDGET)
    key, replies = race.key, race.replies
    answered = replies.count((200, ""))
    promised = BUDGET + answered * size.beyond_usd
    servers.table.append(
        f"| {name} | {'stream' if stream else 'whole'} | {answered} of {CONCURRENCY} | ${BUDGET} | ${key.spent_usd:.5f}"
        f" | ${max(0.0, key.spent_usd - BUDGET):.5f} | ${promised - BUDGET:.5f} |"
    )

    assert {code for status, code in replies if status != 200} <= {"insufficient_quota"}
    assert 0 < answered == round(key.spent_usd / COST)
    assert key.spent_usd <= promised + 1e-9


@pytest.mark.parametrize(("name", "stream"), EACH_SIZE)
def test_a_limit_of_tokens_is_exceeded_by_no_more_than_documented(servers: Servers, name: str, *, stream: bool) -> None:
    """An answer of no stated length is taken to be as long as usual, so that it may leave a debt."""
    size = SIZES[name]
    race = servers.race(size, stream=stream, tokens_per_minute=TOKENS_PER_MINUTE)
    replies, refilled = race.replies, TOKENS_PER_MINUTE * race.lasted_s / 60
    answered = replies.count((200, ""))
    took = answered * (PROMPT_TOKENS + OUTPUT_TOKENS)
    beyond = answered * OUTPUT_TOKENS if size.beyond_usd else 0

    assert {code for status, code in replies if status != 200} <= {"rate_limit_exceeded"}
    assert answered
    assert took <= TOKENS_PER_MINUTE + refilled + beyond


@pytest.mark.parametrize("stream", [False, True])
def test_names_of_one_limit_that_contradict_each_other_spend_nothing(servers: Servers, *, stream: bool) -> None:
    size = RequestedSize({"max_completion_tokens": 1, "max_tokens": 5000})
    race = servers.race(size, stream=stream, usd_per_day=BUDGET)

    assert {status for status, _ in race.replies} == {400}
    assert race.key.spent_usd == 0


@pytest.mark.parametrize("stream", [False, True])
def test_sequential_requests_exceed_a_budget_by_less_than_one_response(servers: Servers, *, stream: bool) -> None:
    key = servers.key(usd_per_day=BUDGET)
    body = {"model": "arm", "messages": ASK, "stream": stream, "max_tokens": 10}
    headers = {"authorization": f"Bearer {key.secret}"}
    statuses = [
        servers.client.post(f"{proxy.url}/v1/chat/completions", json=body, headers=headers).status_code
        for proxy in servers.proxies * 10
    ]
    answered = statuses.index(429)

    assert set(statuses[answered:]) == {429}
    assert BUDGET < answered * COST < BUDGET + COST
