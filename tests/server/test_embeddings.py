from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import redis

from proxy.storage.usage_writer import STREAM
from proxy.storage.valkey import EmbeddedValkey
from tests.support.limited_keys import LimitedKey
from tests.support.proxy_process import NO_COOLDOWN, ProxyProcess, model_entry
from tests.support.scripted_answers import Step
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until

VECTOR = [0.5, -0.25, 2.0]
ENCODED = base64.b64encode(np.array(VECTOR, "<f4").tobytes()).decode()
PRICE = 1e-4


def embeddings_entry(name: str, api_base: str, **info: Any) -> dict[str, Any]:
    entry = model_entry(name, api_base)
    return {**entry, "model_info": {"mode": "embedding", "input_cost_per_token": PRICE, **info}}


def answer(*vectors: Any, tokens: int = 7) -> Step:
    data = [{"object": "embedding", "index": place, "embedding": vector} for place, vector in enumerate(vectors)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return Step(body={"object": "list", "data": data, "model": "theirs", "usage": usage})


@dataclass(frozen=True)
class Served:
    """Hold a proxy with a chat model that is not measured, and two that answer with embeddings."""

    proxy: ProxyProcess
    upstream: ScriptedUpstream
    store: redis.Redis

    def post(self, body: Any, path: str = "/v1/embeddings", **headers: str) -> httpx.Response:
        return httpx.post(self.proxy.url + path, json=body, headers=headers, timeout=60)

    def refusal(self, body: Any, path: str = "/v1/embeddings") -> tuple[int, str | None, str]:
        reply = self.post(body, path)
        error = reply.json()["error"]
        return reply.status_code, error["param"], error["message"]

    def card(self, name: str) -> dict[str, Any]:
        return dict(self.proxy.admin("GET", f"/admin/models/{name}").json())

    def records(self, decision: str) -> list[dict[str, Any]]:
        stored: Any = self.store.xrange(STREAM, "-", "+")
        entries = [json.loads(fields[b"record"]) for _, fields in stored]
        return [entry for entry in entries if entry["decision"] == decision]


@pytest.fixture(scope="module")
def session_served(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("embeddings")
    with ScriptedUpstream() as upstream:
        config = {
            "model_list": [
                {**model_entry("small", upstream.url), "model_info": {}},
                embeddings_entry("vectors", upstream.url),
                embeddings_entry("translated", upstream.url, forward="translate", max_input_tokens=8192),
            ],
            "uniroute": {"breaker": NO_COOLDOWN, "limits_timeout_s": 1.0},
        }
        with (
            ProxyProcess(folder, embedder_cache, config, {"MODEL_API_KEY": "sk-x"}) as proxy,
            redis.Redis(unix_socket_path=str(EmbeddedValkey(folder).socket_path)) as store,
        ):
            yield Served(proxy, upstream, store)


@pytest.fixture
def served(session_served: Served) -> Served:
    session_served.upstream.reset()
    session_served.upstream.always = answer(VECTOR)
    return session_served


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.proxy.url}/v1", api_key="none", max_retries=0, timeout=60) as opened:
        yield opened


def test_the_official_client_reads_vectors_in_either_encoding_of_the_upstream(
    client: openai.OpenAI, served: Served
) -> None:
    served.upstream.then(answer(ENCODED), answer(VECTOR))
    for _ in range(2):
        found = client.embeddings.create(model="vectors", input="What is 2 + 2?")
        assert (found.data[0].embedding, found.model, found.usage.total_tokens) == (VECTOR, "vectors", 7)
    assert served.upstream.last.path == "/v1/embeddings"
    assert served.upstream.last.body["encoding_format"] == "base64"


def test_a_client_gets_numbers_or_base64_as_it_asks(served: Served) -> None:
    served.upstream.always = answer(ENCODED)
    for encoding, expected in (("float", VECTOR), (None, VECTOR), ("base64", ENCODED)):
        reply = served.post({"model": "vectors", "input": "a", "encoding_format": encoding})
        assert reply.json()["data"][0]["embedding"] == expected


@pytest.mark.parametrize("given", ["a", ["a", "b"], [1, 2, 3], [[1, 2], [3]]])
def test_the_bytes_reach_the_upstream_but_for_the_name(served: Served, given: Any) -> None:
    body = {"model": "vectors", "input": given, "dimensions": 3, "user": "u1", "input_type": "query"}
    raw = json.dumps(body, indent=1).encode()
    headers = {"content-type": "application/json"}
    reply = httpx.post(f"{served.proxy.url}/v1/embeddings", content=raw, headers=headers, timeout=60)
    assert reply.status_code == 200
    assert served.upstream.last.raw == raw.replace(b'"vectors"', b'"vectors-upstream"')


def test_our_own_fields_do_not_reach_the_upstream(served: Served) -> None:
    body = {"model": "vectors", "input": "a", "uniroute": {"timeouts": {"total_s": 30}}}
    assert served.post(body).status_code == 200
    assert served.upstream.last.body == {"model": "vectors-upstream", "input": "a"}


def test_a_model_of_another_format_is_asked_through_litellm(client: openai.OpenAI, served: Served) -> None:
    served.upstream.always = answer(VECTOR, VECTOR)
    found = client.embeddings.create(model="translated", input=["a", "b"], dimensions=3)
    assert [each.embedding for each in found.data] == [VECTOR, VECTOR]
    assert (found.model, found.usage.prompt_tokens) == ("translated", 7)
    sent = served.upstream.last
    assert (sent.path, sent.body["input"], sent.body["dimensions"]) == ("/v1/embeddings", ["a", "b"], 3)


@pytest.mark.parametrize("model", ["vectors", "translated"])
def test_an_error_of_the_model_passes_through(served: Served, model: str) -> None:
    served.upstream.always = Step(status=422, body={"error": {"message": "too many inputs", "type": "x"}})
    reply = served.post({"model": model, "input": "a"})
    assert (reply.status_code, reply.json()["error"]["message"]) == (422, "too many inputs")
    assert reply.headers["x-uniroute-model"] == model


def test_a_lost_connection_is_tried_once_more(served: Served) -> None:
    served.upstream.then(Step(drop=True))
    assert served.post({"model": "vectors", "input": "a"}).status_code == 200
    assert len(served.upstream.history) == 2


def test_success_without_vectors_is_a_bad_gateway(served: Served) -> None:
    served.upstream.always = None
    assert served.refusal({"model": "vectors", "input": "a"})[0] == 502


def test_the_response_names_the_decision_and_the_record_has_the_exact_cost(served: Served) -> None:
    reply = served.post({"model": "vectors", "input": "a"})
    decision = reply.headers["x-uniroute-decision"]
    assert (reply.headers["x-uniroute-model"], reply.headers["x-uniroute-reason"]) == ("vectors", "pinned")
    assert wait_until(lambda: served.records(decision))
    (record,) = served.records(decision)
    assert (record["cost_usd"], record["estimated"], record["ending"]) == (pytest.approx(7 * PRICE), False, "complete")
    line = re.compile(rf"decision={decision} model=vectors reason=pinned ending=complete .* tokens=7\+")
    assert wait_until(lambda: line.search(served.proxy.log))


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"input": "a"}, 400, "model"),
        ({"model": "auto", "input": "a"}, 400, "model"),
        ({"model": "uniroute/cheap", "input": "a"}, 400, "model"),
        ({"model": "small", "input": "a"}, 400, "model"),
        ({"model": "unheard-of", "input": "a"}, 404, "model"),
        ({"model": "vectors"}, 400, "input"),
        ({"model": "vectors", "input": []}, 400, "input"),
        ({"model": "vectors", "input": ["a", 1]}, 400, "input"),
        ({"model": "vectors", "input": [[1], []]}, 400, "input"),
        ({"model": "vectors", "input": "a", "encoding_format": "hex"}, 400, "encoding_format"),
        ({"model": "vectors", "input": "a", "dimensions": 0}, 400, "dimensions"),
        ({"model": "vectors", "input": "a", "api_base": "http://x"}, 400, "api_base"),
        ({"model": "vectors", "input": "a", "uniroute": {"lamda": 1}}, 400, "uniroute"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_its_field(
    served: Served, body: dict[str, Any], status: int, param: str
) -> None:
    assert served.refusal(body)[:2] == (status, param)
    assert served.upstream.history == []


def test_a_chat_model_is_refused_with_the_names_of_those_that_embed(served: Served) -> None:
    assert "name one of translated, vectors" in served.refusal({"model": "small", "input": "a"})[2]


@pytest.mark.parametrize("more", [{"model": "vectors"}, {"model": "auto", "models": ["vectors"]}])
def test_chat_does_not_ask_a_model_that_embeds(served: Served, more: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], **more}
    status, param, message = served.refusal(body, "/v1/chat/completions")
    assert (status, param) == (400, "models" if "models" in more else "model")
    assert "/v1/embeddings" in message


def test_a_model_that_embeds_is_neither_measured_nor_a_candidate(served: Served) -> None:
    card = served.card("vectors")
    assert (card["state"], card["job"]) == ("ready", None)
    body = {"model": "auto", "messages": [{"role": "user", "content": "a"}]}
    assert "vectors" not in served.refusal(body, "/v1/route")[2]


def test_a_model_that_embeds_is_added_without_being_measured(served: Served) -> None:
    entry = embeddings_entry("added", served.upstream.url)
    refused = served.proxy.admin(
        "POST", "/admin/models", {**entry, "profile": {"map": "m", "errors": [], "labels": []}}
    )
    added = served.proxy.admin("POST", "/admin/models", entry)
    assert (refused.status_code, added.status_code, added.json()["job"]) == (400, 201, None)
    assert served.post({"model": "added", "input": "a"}).status_code == 200
    assert served.proxy.admin("POST", "/admin/models/added/profile", {"prompts": 1}).status_code == 400


def test_what_litellms_price_map_calls_an_embedding_model_is_one(served: Served) -> None:
    params = {
        "model": "openai/text-embedding-3-small",
        "api_base": served.upstream.url,
        "api_key": "os.environ/MODEL_API_KEY",
    }
    added = served.proxy.admin("POST", "/admin/models", {"model_name": "known", "litellm_params": params})
    assert added.status_code == 201
    assert served.card("known")["price"]["input_cost_per_token"] == 2e-8


# The last of these: from here on a key is required.
def test_a_key_is_limited_in_embeddings_as_in_chat(served: Served) -> None:
    key = LimitedKey.put(served.store, usd_per_day=10 * PRICE, tokens_per_minute=1000)
    headers = {"authorization": f"Bearer {key.secret}"}
    assert wait_until(lambda: served.post({"model": "vectors", "input": "a"}).status_code == 401)
    reply = served.post({"model": "vectors", "input": "a"}, **headers)
    assert (reply.status_code, reply.headers["x-ratelimit-limit-tokens"]) == (200, "1000")
    refused = served.post({"model": "vectors", "input": "a " * 20}, **headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "insufficient_quota")
    assert wait_until(lambda: key.spent_usd == pytest.approx(7 * PRICE))
