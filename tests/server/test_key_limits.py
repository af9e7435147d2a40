from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import redis

from proxy.server.reservations import state_key
from proxy.storage.usage_writer import STREAM
from proxy.storage.valkey import EmbeddedValkey
from tests.support.limited_keys import LimitedKey
from tests.support.proxy_process import ADMIN_KEY, ProxyProcess, model_entry
from tests.support.scripted_answers import Step
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until

ASK: Any = [{"role": "user", "content": "What is 2 + 2?"}]
# USD per prompt token; four times that per token of an answer.
PRICE = 1e-4
USAGE = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
COST = 0.03


@dataclass(frozen=True)
class Limited:
    proxy: ProxyProcess
    upstream: ScriptedUpstream
    store: redis.Redis
    closing: contextlib.ExitStack

    def key(self, **limits: Any) -> LimitedKey:
        """Make a key, and wait until the proxy knows it: before the first one every caller is served."""
        key = LimitedKey.put(self.store, **limits)
        assert wait_until(lambda: httpx.get(f"{self.proxy.url}/v1/models").status_code == 401)
        headers = {"authorization": f"Bearer {key.secret}"}
        assert wait_until(lambda: httpx.get(f"{self.proxy.url}/v1/models", headers=headers).status_code == 200)
        return key

    def client(self, key: LimitedKey, *, max_retries: int = 0) -> openai.OpenAI:
        base_url = f"{self.proxy.url}/v1"
        client = openai.OpenAI(base_url=base_url, api_key=key.secret, max_retries=max_retries, timeout=60)
        return self.closing.enter_context(client)

    def records(self, key: LimitedKey) -> list[dict[str, Any]]:
        stored: Any = self.store.xrange(STREAM, "-", "+")
        entries = [json.loads(fields[b"record"]) for _, fields in stored]
        return [entry for entry in entries if entry["key_id"] == key.id]

    def metric(self, name: str) -> float:
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        text = httpx.get(f"{self.proxy.url}/metrics", headers=headers).text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0


@pytest.fixture(scope="module")
def session_limited(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Limited]:
    folder = tmp_path_factory.mktemp("limited")
    with ScriptedUpstream() as upstream:
        config = {
            "model_list": [
                model_entry("priced", upstream.url, price=PRICE, max_output_tokens=1000),
                model_entry("other", upstream.url, price=PRICE),
                {**model_entry("unpriced", upstream.url), "model_info": {}},
            ],
            "uniroute": {"profile": {"on_start": False}, "limits_timeout_s": 1.0, "request_timeout_s": 2.0},
        }
        with (
            ProxyProcess(folder, embedder_cache, config, {"MODEL_API_KEY": "sk-x"}) as proxy,
            redis.Redis(unix_socket_path=str(EmbeddedValkey(folder).socket_path)) as store,
            contextlib.ExitStack() as closing,
        ):
            proxy.put_profile("priced", 0.1)
            proxy.put_profile("other", 0.1)
            yield Limited(proxy, upstream, store, closing)


@pytest.fixture
def limited(session_limited: Limited) -> Limited:
    upstream = session_limited.upstream
    upstream.script.clear()
    upstream.history.clear()
    upstream.always = Step(usage=USAGE)
    return session_limited


def refused_by(client: openai.OpenAI, **more: Any) -> None:
    with contextlib.suppress(openai.APIError):
        ask(client, **more)


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.with_raw_response.create(**{"model": "priced", "messages": ASK, **more})


def test_every_response_has_the_remaining_limits_in_its_headers(limited: Limited) -> None:
    client = limited.client(limited.key(requests_per_minute=10, tokens_per_minute=6000))
    plain = ask(client, max_tokens=90)
    stream = ask(client, max_tokens=90, stream=True)
    list(stream.parse())

    assert plain.headers["x-ratelimit-limit-requests"] == "10"
    assert plain.headers["x-ratelimit-remaining-requests"] == "9"
    assert plain.headers["x-ratelimit-reset-requests"] == "6s"
    assert stream.headers["x-ratelimit-remaining-requests"] == "8"
    assert stream.headers["x-ratelimit-limit-tokens"] == "6000"
    assert 5700 <= int(stream.headers["x-ratelimit-remaining-tokens"]) < 5950
    assert re.fullmatch(r"[\d.]+m?s", stream.headers["x-ratelimit-reset-tokens"])


def test_a_key_without_limits_gets_no_limit_headers(limited: Limited) -> None:
    headers = ask(limited.client(limited.key())).headers

    assert [name for name in headers if name.startswith("x-ratelimit")] == []


def test_a_request_over_the_limit_is_a_rate_limit_error_with_retry_after(limited: Limited) -> None:
    client = limited.client(limited.key(requests_per_minute=2))
    ask(client)
    ask(client)
    with pytest.raises(openai.RateLimitError) as refused:
        ask(client)

    assert refused.value.code == "rate_limit_exceeded"
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 30
    assert refused.value.response.headers["x-ratelimit-remaining-requests"] == "0"
    assert len(limited.upstream.history) == 2


def test_the_official_client_waits_for_retry_after_and_gets_its_answer(limited: Limited) -> None:
    client = limited.client(limited.key(requests_per_minute=60), max_retries=2)
    for _ in range(61):
        ask(client)

    assert len(limited.upstream.history) == 61


def test_a_spent_budget_is_not_retried_by_the_official_client(limited: Limited) -> None:
    key = limited.key(usd_per_day=0.05)
    client = limited.client(key, max_retries=3)
    ask(client, max_tokens=10)
    assert wait_until(lambda: key.spent_usd == COST)
    refused_before = limited.metric('uniroute_limited_total{limit="day"}')
    with pytest.raises(openai.RateLimitError) as refused:
        ask(client, max_tokens=100)

    assert (refused.value.code, refused.value.type) == ("insufficient_quota", "insufficient_quota")
    assert "$0.05 a day: $0.03 are spent" in refused.value.message
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert limited.metric('uniroute_limited_total{limit="day"}') == refused_before + 1
    assert len(limited.upstream.history) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_immediate_next_request_counts_the_actual_cost_of_the_last_response(
    limited: Limited, *, stream: bool
) -> None:
    """Each answer costs $0.03, six times what was set aside for it."""
    client = limited.client(limited.key(usd_per_day=0.15))
    for _ in range(5):
        answer = ask(client, max_tokens=10, stream=stream).parse()
        if stream:
            list(answer)

    with pytest.raises(openai.RateLimitError, match=r"\$0.15 are spent, \$0 are set aside"):
        ask(client, max_tokens=10, stream=stream)


def test_the_reservation_of_a_request_refused_by_the_model_is_released_at_once(limited: Limited) -> None:
    key = limited.key(usd_per_day=0.05, tokens_per_minute=120)
    client = limited.client(key)
    for _ in range(5):
        limited.upstream.then(Step(status=400, body={"error": {"message": "no", "type": "invalid_request_error"}}))
        with pytest.raises(openai.BadRequestError):
            ask(client, max_tokens=100)
        assert wait_until(lambda: key.open == 0)  # no response waits long for a disk that stalls

    assert len(limited.upstream.history) == 5


def test_the_cost_of_a_request_replaces_its_reservation(limited: Limited) -> None:
    key = limited.key(usd_per_month=1.0)
    limited.upstream.then(Step(usage=USAGE, delay_s=0.3))
    asking = threading.Thread(target=ask, args=(limited.client(key),), kwargs={"max_tokens": 1000})
    asking.start()
    assert wait_until(lambda: key.open == 1)
    set_aside = key.reserved_usd
    asking.join()

    assert 0.4 < set_aside < 0.41
    assert wait_until(lambda: key.open == 0)
    assert (key.spent_usd, key.reserved_usd) == (COST, 0.0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_ends_while_redis_is_frozen_and_is_charged_once_it_answers_again(
    limited: Limited, *, stream: bool
) -> None:
    key = limited.key(usd_per_day=1.0)
    limited.upstream.then(Step(usage=USAGE, delay_s=0.3))
    with ThreadPoolExecutor(1) as asking:
        answer = asking.submit(_read, limited.client(key), stream=stream)
        assert wait_until(lambda: key.open == 1)
        with frozen(limited.store):
            assert answer.result(timeout=60)

    assert wait_until(lambda: key.open == 0)
    assert (key.spent_usd, key.reserved_usd) == (COST, 0.0)
    assert wait_until(lambda: _read(limited.client(key), stream=False))  # limits are checked in the store again


def _read(client: openai.OpenAI, *, stream: bool) -> bool:
    try:
        return bool(list(ask(client, max_tokens=10, stream=stream).parse()))
    except openai.APIStatusError:
        return False


@contextlib.contextmanager
def frozen(store: redis.Redis) -> Iterator[None]:
    info: Any = store.info("server")
    os.kill(info["process_id"], signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(info["process_id"], signal.SIGCONT)


def test_a_fallback_uses_the_reservation_of_the_failed_attempt(limited: Limited) -> None:
    key = limited.key(usd_per_month=1.0)
    limited.upstream.then(Step(status=500, body={"error": {"message": "no"}}), Step(hang=True))
    more = {"max_tokens": 1000, "extra_body": {"uniroute": {"fallbacks": True}}}
    asking = threading.Thread(target=refused_by, args=(limited.client(key),), kwargs=more)
    asking.start()
    assert wait_until(lambda: [entry["ending"] for entry in limited.records(key)] == ["failed"])
    reserved = key.open
    asking.join()

    assert reserved == 1
    assert wait_until(lambda: key.open == 0)
    passed_over, timed_out = limited.records(key)
    assert (passed_over["reservation"], timed_out["reservation"]) == (None, timed_out["decision"])
    assert (passed_over["cost_usd"], timed_out["estimated"]) == (0.0, True)
    assert key.spent_usd == pytest.approx(7 * PRICE)


def test_usage_of_a_key_without_limits_is_counted_without_a_round_trip_before(limited: Limited) -> None:
    key = limited.key()
    ask(limited.client(key))

    assert wait_until(lambda: key.spent_usd == COST)
    assert not limited.store.exists(state_key(key.id))


def test_a_request_refused_by_the_model_costs_nothing_and_has_the_limit_headers(limited: Limited) -> None:
    key = limited.key(usd_per_day=1.0, requests_per_minute=10)
    limited.upstream.then(Step(status=400, body={"error": {"message": "no", "type": "invalid_request_error"}}))
    with pytest.raises(openai.BadRequestError) as refused:
        ask(limited.client(key))

    assert refused.value.response.headers["x-ratelimit-remaining-requests"] == "9"
    assert wait_until(lambda: key.open == 0)
    assert (key.spent_usd, key.reserved_usd) == (0.0, 0.0)


EIGHT_BYTES = b'data: {"choices": [{"delta": {"content": "12345678"}}]}\n\n'


@pytest.mark.parametrize("broken", [Step(cut_after=6), Step(events=[EIGHT_BYTES], done=False)])
def test_the_cost_of_an_unfinished_response_is_estimated_from_what_was_received(limited: Limited, broken: Step) -> None:
    key = limited.key(usd_per_day=1.0)
    limited.upstream.then(broken)
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        list(ask(limited.client(key), stream=True).parse())

    assert wait_until(lambda: key.open == 0)
    prompt = 7 * PRICE
    assert [entry["estimated"] for entry in limited.records(key)] == [True]
    assert prompt < key.spent_usd <= prompt + 20 * 4 * PRICE


def test_a_client_that_disconnects_is_charged_for_the_prompt_and_what_it_was_sent(limited: Limited) -> None:
    key = limited.key(usd_per_day=1.0)
    limited.upstream.then(Step(message={"content": "word " * 50}, drip_s=0.1, usage=USAGE))
    stream = limited.client(key).chat.completions.create(model="priced", messages=ASK, stream=True)
    for _, _ in zip(range(4), stream, strict=False):
        pass
    stream.close()

    assert wait_until(lambda: key.open == 0)
    assert 7 * PRICE < key.spent_usd < COST
    assert [entry["ending"] for entry in limited.records(key)] == ["client_gone"]


def test_the_usage_of_a_model_that_never_reports_it_is_estimated(limited: Limited) -> None:
    key = limited.key(usd_per_day=1.0)
    answer = {"choices": [{"index": 0, "message": {"content": "x" * 400}, "finish_reason": "stop"}]}
    limited.upstream.then(Step(body=answer))
    ask(limited.client(key))

    assert wait_until(lambda: key.open == 0)
    assert 100 * 4 * PRICE < key.spent_usd < 110 * 4 * PRICE


def test_a_model_of_unknown_price_cannot_bypass_a_budget(limited: Limited) -> None:
    with pytest.raises(openai.BadRequestError, match="no price"):
        ask(limited.client(limited.key(usd_per_day=1.0)), model="unpriced")

    assert ask(limited.client(limited.key(requests_per_minute=5)), model="unpriced").headers["x-request-id"]
    assert len(limited.upstream.history) == 1


def test_a_dry_run_and_the_list_of_models_use_nothing(limited: Limited) -> None:
    key = limited.key(requests_per_minute=1)
    headers = {"authorization": f"Bearer {key.secret}"}
    for _ in range(3):
        body = {"model": "priced", "messages": ASK}
        assert httpx.post(f"{limited.proxy.url}/v1/route", json=body, headers=headers).status_code == 200

    assert ask(limited.client(key)).headers["x-ratelimit-remaining-requests"] == "0"
