from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from proxy.profiling.broker import STREAM
from proxy.profiling.job_store import OPEN, AnswerText, PromptAnswer, answers_key, job_key
from proxy.server.reservations import PREFIX
from proxy.storage.audit_log import AUDIT
from proxy.storage.client_keys import ClientKey
from proxy.storage.controls import LambdaOverride, Pause
from proxy.storage.profile_history import ProfileEntry, history_key
from proxy.storage.records import ModelRecord, StoredProfile
from proxy.storage.redis import (
    CHANGED,
    KEYS,
    LATEST_JOBS,
    MODELS,
    PAUSED,
    PREVIOUS_PROFILES,
    PRICING,
    PROFILES,
    SETTINGS,
    VERSION,
    price_key,
)
from proxy.upstream.health import CHANNEL, health_key
from router_core.errors import InvalidInput
from tests.support.makers import PAST_PROFILE
from tests.support.proxy_process import ProxyProcess, model_entry, uniform_profile
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.valkey import ValkeyServer
from tests.support.waiting import wait_until

ASK: Any = [{"role": "user", "content": "What is 2 + 2?"}]
NUMBERS = ("9" * 400, "-1", "-" + "9" * 30, "nan", "inf", "-inf", "1e999", "0x1f", "1_0", "²", "", " ")
TEXTS: tuple[str | bytes, ...] = (
    *NUMBERS,
    b"\xff\xfe\x00\x80",
    "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp\u2066",
    '"\\ud800"',
    '{"model": "\\ud800", "litellm_params": {"model": "x", "\\udfff": "\\ud800"}}',
    "[" * 50_000,
    '{"a":' * 400 + "1" + "}" * 400,
    "[" + "[]," * 20_000 + "[]]",
    "null",
    "true",
    "[]",
    "{}",
)
LEAVES: tuple[Any, ...] = (
    *(None, True, -1, 10**400, float("nan"), float("inf"), 1e308, -0.5, "", "\ud800", "\x1b[2J", [], {}),
    *([[[]]], {"a": {"a": None}}, [None], ["x"] * 3, "9" * 400),
)


def variants(document: Any) -> Iterator[Any]:
    """Yield the document with one of its values replaced, added or left out."""
    if isinstance(document, dict):
        for name, value in document.items():
            yield {key: each for key, each in document.items() if key != name}
            yield from ({**document, name: odd} for odd in LEAVES)
            yield from ({**document, name: inner} for inner in variants(value))
        yield from ({**document, odd: 1} for odd in ("odd", "\x1b[2J", ""))
    elif isinstance(document, list) and document:
        yield document[1:]
        yield from ([odd, *document[1:]] for odd in LEAVES)


def stored(document: Any) -> str:
    return json.dumps(document)


RECORD = {
    "litellm_params": {"model": "openai/x", "api_base": "http://127.0.0.1:9/v1", "extra_body": {"a": [1]}},
    "model_info": {"input_cost_per_token": 1e-6, "output_cost_per_token": 1e-6, "max_input_tokens": 8000},
    "created_at": 1.0,
    "resolved": {
        "way": "relay",
        "model": "x",
        "provider": "openai",
        "api_base": "http://127.0.0.1:9/v1",
        "key_variable": None,
        "renames": {"a": "b"},
    },
}
KEY = {
    "name": "k",
    "digest": "d",
    "created_at": 1.0,
    "models": ["a"],
    "revoked": False,
    "role": "client",
    "limits": {"requests_per_minute": 1, "usd_per_day": 1.0},
    "expires_at": None,
    "lambda_default": 0.1,
    "lambda_min": 0.0,
    "lambda_max": 1.0,
    "previous_digest": None,
    "previous_until": None,
}
JOB: dict[Any, Any] = {
    "model": "kept",
    "fingerprint": "f",
    "state": "ready",
    "total": "24",
    "max_usd": "1",
    "submitted_at": "1",
    "done": "24",
    "failed": "0",
    "unlabelled": "0",
    "spent_usd": "0.1",
    "eta_s": "0",
    "error": "e",
    "measured_at": "2026-01-01T00:00:00Z",
    "map": "",
}
PAUSE = {"at": 1.0, "who": "root"}
LAMBDA = {"value": 0.5, **PAUSE}
ANSWER = {"score": 1.0, "output_tokens": 3, "seconds": 0.1, "cost_usd": 0.1, "finish_reason": "stop", "failed": False}


@dataclass(frozen=True)
class Served:
    proxy: ProxyProcess
    client: redis.Redis
    upstream: ScriptedUpstream
    headers: dict[str, str]
    """Of a key with a budget and rates."""
    key_id: str

    def ask(self, **headers: str) -> int:
        body = {"model": "kept", "messages": ASK}
        url = f"{self.proxy.url}/v1/chat/completions"
        return httpx.post(url, json=body, headers={**self.headers, **headers}, timeout=60).status_code

    def ask_as_admin(self) -> int:
        return self.ask(authorization="Bearer admin-key-of-the-tests")

    def reads(self) -> dict[str, int]:
        """Read everything that can be read, and return the responses."""
        admin = ("models", "models/kept", "models/kept/profiles", "keys", "audit?limit=1000", "settings")
        paths = (*(f"/admin/{path}" for path in (*admin, "jobs/odd", "jobs/odd/outcomes")), "/v1/models", "/metrics")
        return {path: self.proxy.admin("GET", path).status_code for path in (*paths, "/readyz")}

    def changes(self) -> dict[str, int]:
        """Make a change of each kind. They follow each other, so that none is left behind."""
        call, made = self.proxy.admin, {}
        body = {**model_entry("new", self.upstream.url), "profile": uniform_profile(0.1)}
        made["add"] = call("POST", "/admin/models", body).status_code
        made["change"] = call("PATCH", "/admin/models/new", {"model_info": {"max_input_tokens": 9000}}).status_code
        prices = {"input_cost_per_token": 1e-6, "output_cost_per_token": 1e-6}
        made["price"] = call("PUT", "/admin/models/new/pricing", prices).status_code
        made["profile"] = call("POST", "/admin/models/new/profile", uniform_profile(0.2)).status_code
        made["pause"] = call("PATCH", "/admin/models/new", {"paused": True}).status_code
        made["lambda"] = call("PUT", "/admin/settings", {"lambda": 0.1}).status_code
        made["remove"] = call("DELETE", "/admin/models/new").status_code
        key = call("POST", "/admin/keys", {"name": "k"})
        made["key"] = key.status_code
        made["revoke"] = call("DELETE", f"/admin/keys/{key.json().get('id')}").status_code
        return made


DONE = dict.fromkeys(("change", "price", "profile", "pause", "lambda"), 200)
DONE |= {"add": 201, "key": 201, "remove": 204, "revoke": 204}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Served]:
    """Start a server over a store that is full of odd entries already."""
    folder = tmp_path_factory.mktemp("odd")
    environ = {"MODEL_API_KEY": "sk-x"}
    with ValkeyServer(folder / "valkey") as valkey, valkey.client() as client, ScriptedUpstream() as upstream:
        fill(client)
        environ["UNIROUTE_REDIS_URL"] = valkey.url
        config = {"model_list": [model_entry("kept", upstream.url)], "uniroute": {"profile": {"on_start": False}}}
        with ProxyProcess(folder / "proxy", embedder_cache, config, environ) as proxy:
            proxy.put_profile("kept", 0.1)
            terms = {"usd_per_day": 9, "usd_per_month": 9, "requests_per_minute": 10_000, "tokens_per_minute": 10**6}
            made = proxy.admin("POST", "/admin/keys", {"name": "limited", **terms}).json()
            headers = {"authorization": f"Bearer {made['key']}"}
            yield Served(proxy, client, upstream, headers, made["id"])


PROFILE = {
    "fingerprint": "f",
    "job": None,
    "profile": {
        "map": "m",
        "errors": [0.1, 0.2],
        "labels": [1.0, 2.0],
        "mean_output_tokens": 3.0,
        "token_sums": [1, 2],
    },
}


def fill(client: redis.Redis) -> None:
    """Fill every hash of entries with every odd entry."""
    with client.pipeline(transaction=False) as pipe:
        entries = ((MODELS, RECORD), (PROFILES, PROFILE), (PREVIOUS_PROFILES, PROFILE), (KEYS, KEY))
        for key, good in (*entries, (PAUSED, PAUSE), (SETTINGS, LAMBDA)):
            for number, text in enumerate([*TEXTS, *islice(map(stored, variants(good)), 0, None, 10)]):
                pipe.hset(key, f"odd-{number}", text)
            pipe.hset(key, "\x1b[31mred\n", stored(good))
        for text in islice(map(stored, variants(PAST_PROFILE)), 0, None, 10):
            pipe.rpush(history_key("kept"), text)
        pipe.hset(MODELS, "huge", "x" * 4_100_000)
        for number, text in enumerate(TEXTS):
            pipe.xadd(AUDIT, {"line": text})
            pipe.rpush(history_key("kept"), text)
            pipe.xadd(STREAM, {"data": text})
            pipe.hset(LATEST_JOBS, f"odd-{number}", text)
            pipe.sadd(OPEN, text)
        for message in variants({"task_id": "1", "task_name": "uniroute.profile", "args": ["x"], "kwargs": {}}):
            pipe.xadd(STREAM, {"data": stored(message)})
        pipe.xadd(AUDIT, {"line": "{}"}, id="18446744073709551000-1")
        for number, text in enumerate([*TEXTS, *map(stored, variants(ANSWER))]):
            pipe.hset(answers_key("odd"), f"prompt-{number}", text)
        pipe.hset(job_key("odd"), mapping=JOB)
        pipe.hset(LATEST_JOBS, "kept", "odd")
        pipe.execute()


READERS: dict[str, tuple[Any, Callable[[str], object]]] = {
    "model": (RECORD, lambda text: ModelRecord.from_json("odd", text).to_json()),
    "profile": (PROFILE, lambda text: StoredProfile.from_json(text).to_json()),
    "key": (KEY, lambda text: ClientKey.from_json("odd", text).to_json()),
    "past profile": (PAST_PROFILE, lambda text: ProfileEntry.from_text(text).to_text()),
    "pause": (PAUSE, lambda text: Pause.from_json(text).to_json()),
    "lambda": (LAMBDA, lambda text: LambdaOverride.from_json(text).to_json()),
    "text of an answer": ({"text": "a", "chars": 1}, lambda text: AnswerText.from_json(text).to_json()),
    "answer": (ANSWER, lambda text: PromptAnswer.from_json(text).to_json()),
}


@pytest.mark.parametrize("name", READERS)
def test_an_odd_entry_is_refused_or_can_be_sent_on(name: str) -> None:
    good, read = READERS[name]
    for text in (*TEXTS, *map(stored, variants(good)), *(stored(each) for odd in variants(good) for each in [[odd]])):
        with suppress(InvalidInput):
            json.dumps(read(text if isinstance(text, str) else text.decode("utf-8", "replace")), allow_nan=False)


def test_a_server_over_a_store_full_of_odd_entries_serves_and_accepts_changes(served: Served) -> None:
    assert served.ask() == 200
    assert {path: status for path, status in served.reads().items() if status != 200} == {}
    assert served.changes() == DONE


@pytest.fixture(scope="module")
def emptied(served: Served) -> Served:
    """Remove the odd entries, which take long to be read each time."""
    served.client.delete(MODELS, PREVIOUS_PROFILES, answers_key("odd"), LATEST_JOBS)
    for key in (PROFILES, KEYS):
        odd = [name for name in served.client.hkeys(key) if name not in ("kept", served.key_id)]
        served.client.hdel(key, *odd)
    served.client.publish(CHANGED, "1")
    return served


def test_each_odd_entry_is_logged_once_on_one_line(served: Served) -> None:
    assert served.proxy.log.count("uniroute:models odd-0:") == 1
    assert "\x1b" not in served.proxy.log
    assert "uniroute:models red" in served.proxy.log


SOME = (*NUMBERS[:7], *TEXTS[len(NUMBERS) : len(NUMBERS) + 2], "[" * 50_000)


@pytest.mark.parametrize("odd", SOME, ids=range(len(SOME)))
def test_an_odd_value_in_any_single_place_stops_nothing(emptied: Served, odd: str | bytes) -> None:
    client, root = emptied.client, f"{PREFIX}{{{emptied.key_id}}}:"
    client.set(VERSION, odd)
    client.publish(CHANGED, odd)
    client.publish(CHANNEL, odd)
    client.publish(PRICING, odd)
    client.hset(SETTINGS, "lambda", odd)
    client.rpush(history_key("kept"), odd)
    client.set(health_key("kept"), odd)
    for field in ("input_cost_per_token", "output_cost_per_token", "source", "updated_at"):
        client.hset(price_key("kept"), field, odd)
    for field in JOB.keys() - {"model", "state"}:
        client.hset(job_key("odd"), field, odd)
    for field in ("requests", "tokens", "requests_at", "tokens_at", "tokens_limit", "reserved"):
        client.hset(f"{root}state", field, odd)
    client.hset(f"{root}held", "odd", odd)
    client.zadd(f"{root}open", {"odd": 1.0})
    assert emptied.ask_as_admin() == 200
    assert emptied.ask() in (200, 429)
    assert {path: status for path, status in emptied.reads().items() if status != 200} == {}
    assert emptied.changes() == DONE
    client.delete(f"{root}state", f"{root}held", price_key("kept"), health_key("kept"))
    assert wait_until(lambda: emptied.ask() == 200)


# Not -1: the cost of a request that has just ended may be added to it, and then it is a count.
@pytest.mark.parametrize("odd", ["9" * 400, "-" + "9" * 15, "-" + "9" * 30, "nan", "inf", "1e999"])
def test_a_budget_with_an_unreadable_sum_refuses_until_it_is_repaired(emptied: Served, odd: str) -> None:
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    for period in (f"day:{today}", f"month:{today[:7]}"):
        key = f"{PREFIX}{{{emptied.key_id}}}:{period}"
        emptied.client.set(key, odd)
        assert emptied.ask() in (402, 429, 503)
        emptied.client.delete(key)
        assert wait_until(lambda: emptied.ask() == 200)


WRONG_KINDS = {
    "list": lambda client, key: client.rpush(key, "x"),
    "stream": lambda client, key: client.xadd(key, {"x": "y"}),
    "set": lambda client, key: client.sadd(key, "x"),
}


@pytest.mark.parametrize("kind", WRONG_KINDS)
def test_a_redis_key_of_another_type_fails_no_request_and_no_read(emptied: Served, kind: str) -> None:
    hashes = (MODELS, PROFILES, PREVIOUS_PROFILES, PAUSED, SETTINGS)
    keys = (VERSION, *hashes, price_key("kept"), health_key("kept"), LATEST_JOBS, job_key("odd"))
    emptied.client.delete(*keys)
    for key in keys:
        WRONG_KINDS[kind](emptied.client, key)
    emptied.client.publish(CHANGED, "1")
    assert wait_until(lambda: "uniroute:models: cannot be read, the last reading stays" in emptied.proxy.log)
    assert (emptied.ask_as_admin(), emptied.ask()) == (200, 200)
    readable = {path for path, status in emptied.reads().items() if status == 200}
    assert {"/admin/models", "/admin/models/kept", "/v1/models", "/metrics", "/readyz"} <= readable
    emptied.client.delete(*keys)
    emptied.proxy.put_profile("kept", 0.1)


def test_no_error_of_ours_was_logged(emptied: Served) -> None:
    assert "Traceback" not in emptied.proxy.log
