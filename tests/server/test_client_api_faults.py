"""Every API that clients speak, under faults: silence, shutdown, odd upstreams, limits, refusals at every layer."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
import redis

from proxy.errors import SHUTTING_DOWN_MESSAGE
from proxy.storage.usage_writer import STREAM
from proxy.storage.valkey import EmbeddedValkey
from tests.support.client_apis import API_NAMES, PATHS, APIName, Reply, ask, body_of, events_of
from tests.support.command import ServeCommand, environment
from tests.support.limited_keys import LimitedKey
from tests.support.native_answers import (
    MESSAGE,
    MESSAGE_EVENTS,
    RESPONSE_EVENTS,
    a_response,
    event,
)
from tests.support.proxy_process import NO_COOLDOWN, ProxyProcess, model_entry, uniform_profile
from tests.support.scripted_answers import Step, error_body
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.valkey import frozen
from tests.support.waiting import wait_until

EVERY_API = pytest.mark.parametrize("api", API_NAMES)
NATIVE_APIS = ("messages", "responses")
EVERY_NATIVE_API = pytest.mark.parametrize("api", NATIVE_APIS)
STREAMED_OR_NOT = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])

# USD per prompt token; four times that per token of an answer.
PRICE = 1e-4
USAGE = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
EVENTS = {"messages": MESSAGE_EVENTS, "responses": RESPONSE_EVENTS}
KEEP_ALIVE_S = 0.1
WEB_PAGE = "https://app.example"
COMMENT = b": keep-alive\n\n"
PING = b'event: ping\ndata: {"type":"ping"}\n\n'
# What states the limit of an answer.
LIMIT_NAMES = {"responses": "max_output_tokens"}


@dataclass(frozen=True)
class Served:
    """One proxy. "chat" and "other" are asked in chat completions, "native" in the client's own API."""

    proxy: ProxyProcess
    chat: ScriptedUpstream
    other: ScriptedUpstream
    native: ScriptedUpstream
    vectors: ScriptedUpstream
    store: redis.Redis

    @property
    def upstreams(self) -> list[ScriptedUpstream]:
        return [self.chat, self.other, self.native, self.vectors]

    def key(self, **limits: Any) -> LimitedKey:
        """Make a key, and wait until the proxy knows it: before the first one every caller is served."""
        key = LimitedKey.put(self.store, **limits)
        assert wait_until(lambda: httpx.get(f"{self.proxy.url}/v1/models").status_code == 401)
        url, headers = f"{self.proxy.url}/v1/models", {"authorization": f"Bearer {key.secret}"}
        assert wait_until(lambda: httpx.get(url, headers=headers).status_code == 200)
        return key

    def records(self, key: LimitedKey) -> list[dict[str, Any]]:
        stored: Any = self.store.xrange(STREAM, "-", "+")
        entries = [json.loads(fields[b"record"]) for _, fields in stored]
        return [entry for entry in entries if entry["key_id"] == key.id]


def entries(chat: str, other: str, native: str, vectors: str) -> list[dict[str, Any]]:
    return [
        model_entry("chat", chat, price=PRICE, max_output_tokens=8000, supports_vision=False),
        model_entry("seeing", other, price=3 * PRICE, max_output_tokens=8000, supports_vision=True),
        model_entry("other", other, price=2 * PRICE, max_output_tokens=8000, supports_vision=False),
        model_entry(
            *("native", native), price=PRICE, api=["chat", *NATIVE_APIS], supports_reasoning=True, supports_vision=False
        ),
        {
            **model_entry("vectors", vectors),
            "model_info": {"mode": "embedding", "input_cost_per_token": PRICE},
        },
    ]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("faults")
    with ExitStack() as closing:
        upstreams = [closing.enter_context(ScriptedUpstream()) for _ in range(4)]
        config = {
            "model_list": entries(*(upstream.url for upstream in upstreams)),
            "uniroute": {
                "profile": {"on_start": False},
                "breaker": NO_COOLDOWN,
                "keep_alive_s": KEEP_ALIVE_S,
                "limits_timeout_s": 1.0,
                "max_body_bytes": 2_000_000,
                "allowed_origins": [WEB_PAGE],
            },
        }
        proxy = closing.enter_context(ProxyProcess(folder, embedder_cache, config, {"MODEL_API_KEY": "sk-model"}))
        store = closing.enter_context(redis.Redis(unix_socket_path=str(EmbeddedValkey(folder).socket_path)))
        for name in ("chat", "other", "native"):
            proxy.put_profile(name, 0.1)
        chat, other, native, vectors = upstreams
        yield Served(proxy, chat, other, native, vectors, store)


@pytest.fixture(scope="module")
def open_key(started: Served) -> LimitedKey:
    return started.key()


@pytest.fixture
def served(started: Served) -> Served:
    for upstream in started.upstreams:
        upstream.reset()
    return started


@pytest.fixture
def http(served: Served, open_key: LimitedKey) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {open_key.secret}"}
    with httpx.Client(base_url=served.proxy.url, headers=headers, timeout=60) as opened:
        yield opened


def pinned(api: APIName, model: str = "chat", **more: Any) -> dict[str, Any]:
    return body_of(api, model=model, **more)


def raw_stream(http: httpx.Client, api: APIName, **more: Any) -> tuple[httpx.Response, bytes]:
    with http.stream("POST", PATHS[api], json=pinned(api, **{"stream": True, **more})) as reply:
        return reply, reply.read()


# Silence.


@EVERY_API
def test_a_silent_model_is_waited_for_with_comments_and_then_with_what_the_api_has(
    http: httpx.Client, served: Served, api: APIName
) -> None:
    served.chat.then(Step(delay_s=0.3, message={"content": "one two"}, drip_s=0.25))
    _, raw = raw_stream(http, api)
    before, found, after = raw.partition(b"one")

    assert before.startswith(COMMENT)
    assert found
    assert (PING if api == "messages" else COMMENT) in after
    assert PING not in before.partition(b"message_start")[0]


@EVERY_NATIVE_API
def test_a_silent_upstream_of_the_same_api_is_waited_for_in_the_same_way(
    http: httpx.Client, served: Served, api: APIName
) -> None:
    events = EVENTS[api]
    content = 5
    served.native.then(Step(events=[b"".join(events[:content]), b"".join(events[content:])], drip_s=0.25, done=False))
    _, raw = raw_stream(http, api, model="native")
    kept = PING if api == "messages" else COMMENT

    assert raw.replace(kept, b"").replace(b'"native"', b'"theirs"') == b"".join(events)
    assert raw.count(kept) >= 1


@EVERY_API
def test_a_failure_behind_the_first_comment_is_one_error_in_the_clients_shape(
    http: httpx.Client, served: Served, api: APIName
) -> None:
    served.chat.then(Step(delay_s=0.25, status=429, body=error_body("slow down", "rate_limit_error", None)))
    reply = ask(http, api, pinned(api, stream=True))

    assert (reply.status, len(reply.errors), reply.complete) == (200, 1, False)
    stated = {"messages": ("type", "rate_limit_error"), "responses": ("code", "rate_limit_exceeded")}
    name, value = stated.get(api, ("type", "rate_limit_error"))
    assert (reply.errors[0][name], reply.errors[0]["message"]) == (value, "slow down")


# Odd upstreams of chat completions.


@EVERY_API
def test_a_whole_answer_in_place_of_a_stream_is_streamed(http: httpx.Client, served: Served, api: APIName) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "whole"}, "finish_reason": "stop"}
    served.chat.then(Step(body={"id": "c", "object": "chat.completion", "choices": [choice], "usage": USAGE}))
    reply = ask(http, api, pinned(api, stream=True))

    assert (reply.text, reply.complete) == ("whole", True)


@EVERY_API
def test_an_error_event_after_content_ends_the_stream_as_an_error(
    http: httpx.Client, served: Served, api: APIName
) -> None:
    chunk = {"id": "c", "choices": [{"index": 0, "delta": {"content": "so far"}, "finish_reason": None}]}
    served.chat.then(Step(events=[chunk, {"error": {"message": "it broke", "type": "server_error", "code": 500}}]))
    reply = ask(http, api, pinned(api, stream=True))

    assert (reply.text, len(reply.errors), reply.complete) == ("so far", 1, False)
    assert "it broke" in reply.errors[0]["message"]


@EVERY_API
@STREAMED_OR_NOT
def test_an_answer_without_usage_is_whole_all_the_same(
    http: httpx.Client, served: Served, api: APIName, stream: bool
) -> None:
    choice = {"index": 0, "message": {"content": "hi"}, "finish_reason": "stop"}
    chunk = {"id": "c", "choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}]}
    served.chat.then(Step(events=[chunk]) if stream else Step(body={"id": "c", "choices": [choice]}))
    reply = ask(http, api, pinned(api, stream=stream))

    assert (reply.text, reply.complete) == ("hi", True)


@EVERY_API
@STREAMED_OR_NOT
@pytest.mark.parametrize(
    ("first", "last"),
    [
        ({"prompt_tokens": 100, "completion_tokens": 0}, {"prompt_tokens": 0, "completion_tokens": 50}),
        ({"prompt_tokens": 100}, {"completion_tokens": 50}),
        (USAGE, {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}),
    ],
    ids=["halves with zeros", "halves", "zeros last"],
)
def test_what_several_reports_of_usage_say_together_is_told_and_booked(
    http: httpx.Client,
    served: Served,
    open_key: LimitedKey,
    api: APIName,
    stream: bool,
    first: dict[str, int],
    last: dict[str, int],
) -> None:
    text = {"id": "c", "choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": None}], "usage": first}
    end = {"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    events = [f"data: {json.dumps(each)}\n\n".encode() for each in (text, end, {"choices": [], "usage": last})]
    served.chat.then(Step(events=events) if stream else Step(body=b"".join(events)))
    asked: dict[str, Any] = {"stream_options": {"include_usage": True}} if api in ("chat", "completions") else {}
    reply = http.post(PATHS[api], json=pinned(api, stream=stream, **asked))
    told = [json.loads(line[6:]) for line in reply.text.splitlines() if line[6:7] == "{"] if stream else [reply.json()]
    usage = [found for each in told if (found := each.get("response", each).get("usage"))][-1]

    assert [usage.get("prompt_tokens", usage.get("input_tokens"))] == [100]
    assert [usage.get("completion_tokens", usage.get("output_tokens"))] == [50]
    decision = reply.headers["x-uniroute-decision"]
    assert wait_until(lambda: [each for each in served.records(open_key) if each["decision"] == decision])
    (booked,) = [each for each in served.records(open_key) if each["decision"] == decision]
    assert (booked["prompt_tokens"], booked["output_tokens"]) == (100, 50)


@EVERY_API
@STREAMED_OR_NOT
def test_an_empty_answer_of_the_only_model_is_a_whole_answer(
    http: httpx.Client, served: Served, api: APIName, stream: bool
) -> None:
    served.chat.then(Step(message={"content": ""}))
    reply = ask(http, api, pinned(api, stream=stream))

    assert (reply.status, reply.text, reply.complete) == (200, "", True)


@EVERY_API
@STREAMED_OR_NOT
def test_of_several_answers_each_api_has_those_that_it_knows(
    http: httpx.Client, served: Served, api: APIName, stream: bool
) -> None:
    reply = http.post(PATHS[api], json=pinned(api, n=2, stream=stream))

    assert reply.status_code == 200
    knows = api in ("chat", "completions")
    assert served.chat.last.body.get("n") == (2 if knows else None)
    if not knows:
        assert "n" in reply.headers["x-uniroute-left-out"].split(", ")


@EVERY_API
@STREAMED_OR_NOT
def test_a_lone_surrogate_in_the_words_of_an_upstreams_error_stays_an_error(
    http: httpx.Client, served: Served, api: APIName, stream: bool
) -> None:
    served.chat.then(Step(status=400, body=b'{"error":{"message":"half \\ud83d","type":"x","n":1e999}}'))
    reply = http.post(PATHS[api], json=pinned(api, stream=stream))

    assert (reply.status_code, reply.json()["error"]["message"]) == (400, "half \ud83d")


# Upstreams that speak the client's own API.


def broken_off(api: APIName, *more: bytes, after: int) -> Step:
    """Return a stream with content that ends with these events in place of its own."""
    return Step(events=[*EVENTS[api][:after], *more], done=False)


OVERLOADED = event({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}})
FAILED = event({"type": "response.failed", "response": a_response("failed", error={"code": "x", "message": "no"})})
WITHOUT_RESPONSE = event({"type": "response.in_progress", "response": None, "sequence_number": 10})


@pytest.mark.parametrize(
    ("api", "more"),
    [
        pytest.param("messages", [], id="ends"),
        pytest.param("messages", [OVERLOADED], id="error"),
        pytest.param("messages", [b"<html><body>502 Bad Gateway</body></html>\n\n"], id="html"),
        pytest.param("messages", [b"\x1f\x8b\x08\x00\xff\xfe\n\n"], id="gzip"),
        pytest.param("messages", [MESSAGE_EVENTS[8][:30]], id="half an event"),
        pytest.param("messages", [b"data: [1]\n\n"], id="a list"),
        pytest.param("responses", [], id="ends "),
        pytest.param("responses", [FAILED], id="failed"),
        pytest.param("responses", [event({"type": "error", "code": "x", "message": "no"})], id="error "),
        pytest.param("responses", [b"<html><body>502 Bad Gateway</body></html>\n\n"], id="html "),
        pytest.param("responses", [RESPONSE_EVENTS[10][:30]], id="half an event "),
        pytest.param("responses", [WITHOUT_RESPONSE], id="a response that is none"),
    ],
)
def test_a_native_stream_that_goes_wrong_after_content_ends_with_one_error_that_follows_its_events(
    http: httpx.Client, served: Served, api: APIName, more: list[bytes]
) -> None:
    served.native.then(broken_off(api, *more, after=10))
    _, raw = raw_stream(http, api, model="native")
    events = events_of(raw)
    last = events[-1]

    assert last["type"] == ("error" if api == "messages" else "response.failed")
    if api == "responses":
        assert [each["sequence_number"] for each in events] == list(range(len(events)))
        assert (last["response"]["status"], last["response"]["model"]) == ("failed", "native")
    assert served.other.history == []


def test_a_native_response_that_fails_without_ever_being_named_is_named_by_us(
    http: httpx.Client, served: Served
) -> None:
    served.native.then(Step(events=list(RESPONSE_EVENTS[2:10]), done=False))
    _, raw = raw_stream(http, "responses", model="native")
    events = events_of(raw)

    assert [each["type"] for each in events][-2:] == ["response.output_text.delta", "response.failed"]
    assert [each["sequence_number"] for each in events] == list(range(2, 11))
    assert events[-1]["response"]["id"].startswith("resp_")


@EVERY_NATIVE_API
@pytest.mark.parametrize(
    "instead",
    [b"<html>502</html>", b"\x1f\x8b\x08\x00\xff", b"data: [1]\n\n", b"", OVERLOADED, FAILED],
    ids=["html", "gzip", "a list", "nothing", "overloaded", "failed"],
)
def test_a_native_stream_that_goes_wrong_before_content_is_answered_by_the_next_model(
    http: httpx.Client, served: Served, api: APIName, instead: bytes
) -> None:
    served.native.then(Step(events=[EVENTS[api][0], instead], done=False))
    reply = ask(http, api, pinned(api, "native", stream=True, uniroute={"fallbacks": True}))

    assert (reply.complete, len(served.native.history)) == (True, 1)
    assert reply.model in ("chat", "other")


@STREAMED_OR_NOT
@pytest.mark.parametrize(
    ("code", "status"),
    [("invalid_prompt", 400), ("image_too_large", 400), ("rate_limit_exceeded", 429), ("server_error", 502)],
)
def test_a_native_response_that_failed_at_once_has_the_status_that_its_code_means(
    http: httpx.Client, served: Served, code: str, status: int, stream: bool
) -> None:
    failed = a_response("failed", error={"code": code, "message": "as it says"})
    events = [RESPONSE_EVENTS[0], event({"type": "response.failed", "response": failed})]
    served.native.then(Step(events=events, done=False) if stream else Step(body=failed))
    reply = http.post("/v1/responses", json=pinned("responses", "native", stream=stream))

    assert (reply.status_code, reply.json()["error"]["message"]) == (status, "as it says")


@EVERY_NATIVE_API
def test_a_large_native_event_and_unknown_ones_arrive_as_they_are(
    http: httpx.Client, served: Served, api: APIName
) -> None:
    large = event({"type": "new", "text": "x" * 5_000_000, "model": "theirs", "deep": {"model": "theirs"}})
    events = [*EVENTS[api][:10], large, event({"type": ["odd"]}, "odd"), *EVENTS[api][10:]]
    served.native.then(Step(events=events, done=False))
    _, raw = raw_stream(http, api, model="native")

    assert raw.count(b"x" * 5_000_000) == 1
    assert b'"deep": {"model": "theirs"}' in raw
    assert raw.endswith(EVENTS[api][-1].replace(b'"theirs"}', b'"native"}')[-40:])


def test_the_start_of_a_native_message_may_come_in_single_bytes(http: httpx.Client, served: Served) -> None:
    start, rest = MESSAGE_EVENTS[0], MESSAGE_EVENTS[1:]
    pieces = [start[place : place + 1] for place in range(len(start))]
    served.native.then(Step(events=[*pieces, *rest], done=False))
    _, raw = raw_stream(http, "messages", model="native")

    assert raw.replace(b'"native"', b'"theirs"') == b"".join(MESSAGE_EVENTS)


# Refusals, at every layer.

SDK_ERRORS: dict[int, type[anthropic.APIStatusError]] = {
    400: anthropic.BadRequestError,
    401: anthropic.AuthenticationError,
    403: anthropic.PermissionDeniedError,
    404: anthropic.NotFoundError,
    409: anthropic.ConflictError,
    413: anthropic.RequestTooLargeError,
    422: anthropic.UnprocessableEntityError,
    429: anthropic.RateLimitError,
    500: anthropic.InternalServerError,
    503: anthropic.OverloadedError,
    504: anthropic.DeadlineExceededError,
    529: anthropic.OverloadedError,
}


@pytest.fixture
def claude(served: Served, open_key: LimitedKey) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.proxy.url, api_key=open_key.secret, max_retries=0) as opened:
        yield opened


@pytest.mark.parametrize("status", SDK_ERRORS)
@STREAMED_OR_NOT
def test_anthropics_client_raises_its_own_error_for_each_status(
    claude: anthropic.Anthropic, served: Served, status: int, stream: bool
) -> None:
    served.chat.then(Step(status=status, body=error_body("as it says", "x", None)))
    with pytest.raises(SDK_ERRORS[status], match="as it says") as raised:
        claude.messages.create(model="chat", max_tokens=9, messages=[{"role": "user", "content": "hi"}], stream=stream)

    assert raised.value.request_id == raised.value.response.headers["x-request-id"]


REFUSED: dict[str, tuple[int, dict[str, Any]]] = {
    "no key": (401, {"headers": {"authorization": ""}}),
    "a wrong key": (401, {"headers": {"authorization": "Bearer sk-wrong"}}),
    "an unknown model": (404, {"json": {"model": "nobody"}}),
    "a large body": (413, {"json": {"more": "x" * 2_100_000}}),
    "no JSON": (400, {"content": b"{"}),
    "a list": (400, {"content": b"[]"}),
    "a text": (415, {"headers": {"content-type": "text/plain"}}),
    "compressed": (415, {"headers": {"content-encoding": "gzip"}}),
    "an unknown host": (403, {"headers": {"host": "evil.example"}}),
    "a strange web page": (403, {"headers": {"origin": "https://evil.example"}}),
    "a loop": (400, {"headers": {"x-uniroute-hops": "a,b,c,d,e"}}),
    "GET": (405, {"method": "GET"}),
    "OPTIONS": (405, {"method": "OPTIONS"}),
    "an unknown path": (404, {"below": "/batches/x"}),
    "no model": (404, {"json": {"uniroute": {"models": ["nobody"]}}}),
    "a control field": (400, {"json": {"extra_body": {"api_base": "http://127.0.0.1:1"}}}),
}


@EVERY_API
@pytest.mark.parametrize("how", REFUSED)
def test_each_layer_refuses_in_the_shape_of_the_clients_api(http: httpx.Client, api: APIName, how: str) -> None:
    status, more = REFUSED[how]
    method, path = more.get("method", "POST"), PATHS[api] + more.get("below", "")
    content = more.get("content") or json.dumps(pinned(api, **more.get("json", {}))).encode()
    headers = {"content-type": "application/json", **more.get("headers", {})}
    reply = http.request(method, path, content=content, headers=headers)
    body = reply.json()

    assert reply.status_code == status, body
    assert body["error"]["message"]
    assert ("code" in body["error"], body.get("type")) == ((False, "error") if api == "messages" else (True, None))
    assert body.get("request_id", reply.headers["x-request-id"]) == reply.headers["x-request-id"]


@EVERY_API
def test_an_allowed_web_page_may_ask_in_every_api_and_read_its_errors(http: httpx.Client, api: APIName) -> None:
    asked = "x-api-key,anthropic-version,anthropic-dangerous-direct-browser-access,content-type"
    preflight = http.options(
        PATHS[api],
        headers={
            "origin": WEB_PAGE,
            "access-control-request-method": "POST",
            "access-control-request-headers": asked,
        },
    )
    refused = http.post(PATHS[api], json=pinned(api, "nobody"), headers={"origin": WEB_PAGE})

    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, WEB_PAGE)
    assert set(asked.split(",")) <= {
        each.strip() for each in preflight.headers["access-control-allow-headers"].split(",")
    }
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (404, WEB_PAGE)
    assert "request-id" in refused.headers["access-control-expose-headers"].split(", ")


@pytest.mark.parametrize("api", ["chat", "messages", "responses"])
def test_an_image_is_refused_where_no_model_can_see(http: httpx.Client, api: APIName) -> None:
    url = "data:image/png;base64,iVBORw0KGgo="
    parts: dict[str, Any] = {
        "chat": [{"type": "image_url", "image_url": {"url": url}}],
        "messages": [
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
        ],
        "responses": [{"type": "input_image", "image_url": url}],
    }
    turns = [{"role": "user", "content": parts[api]}]
    body = {**body_of(api, models=["chat", "other", "native"]), "input" if api == "responses" else "messages": turns}
    reply = ask(http, api, body)

    assert reply.status == 400
    assert "cannot read images" in json.dumps(reply.errors)


# Limits of one key over all APIs.

SOURCES = [*((api, "chat") for api in API_NAMES), *((api, "native") for api in NATIVE_APIS), ("embeddings", "vectors")]


def ask_any(http: httpx.Client, source: tuple[Any, str], stream: bool = False) -> httpx.Response:
    """Ask for an answer of at most 100 tokens, or for the vectors of 100 tokens. `stream`: of models asked in chat."""
    api, model = source
    stream = stream and model == "chat"
    if api == "embeddings":
        return http.post("/v1/embeddings", json={"model": model, "input": [[1] * 100]})
    limit = {"max_output_tokens" if api == "responses" else "max_tokens": 100}
    return http.post(PATHS[api], json=pinned(api, model, stream=stream, **limit))


def let_all_answer(served: Served) -> None:
    """Let every upstream report what a request is reserved for at most, or less."""
    served.chat.always = Step(usage={"prompt_tokens": 5, "completion_tokens": 90, "total_tokens": 95})
    data = [{"object": "embedding", "index": 0, "embedding": [0.5]}]
    usage = {"prompt_tokens": 100, "total_tokens": 100}
    served.vectors.always = Step(body={"object": "list", "data": data, "model": "theirs", "usage": usage})
    message = {**MESSAGE, "usage": {"input_tokens": 5, "output_tokens": 90}}
    response = a_response(usage={"input_tokens": 5, "output_tokens": 90, "total_tokens": 95})
    served.native.skill_by_path = {"/v1/messages": message, "/v1/responses": response}


@STREAMED_OR_NOT
def test_requests_over_all_apis_never_spend_more_than_the_budget_of_their_key(served: Served, stream: bool) -> None:
    let_all_answer(served)
    key = served.key(usd_per_day=0.5)
    headers = {"authorization": f"Bearer {key.secret}"}
    with httpx.Client(base_url=served.proxy.url, headers=headers, timeout=60) as http, ThreadPoolExecutor(8) as pool:
        sources = SOURCES * 6
        replies = list(pool.map(lambda source: ask_any(http, source, stream), sources))
    statuses = [reply.status_code for reply in replies]
    answered = statuses.count(200)

    assert set(statuses) == {200, 429}
    assert wait_until(lambda: len(served.records(key)) == answered and key.open == 0)
    assert 0.5 - 0.0405 * 8 <= key.spent_usd <= 0.5
    assert key.spent_usd == pytest.approx(sum(record["cost_usd"] for record in served.records(key)))
    refused = {source[0]: reply.json() for source, reply in zip(sources, replies, strict=True) if reply.is_error}
    assert refused["messages"]["error"]["type"] == "rate_limit_error"
    assert refused["responses"]["error"]["code"] == "insufficient_quota"


def test_requests_over_all_apis_count_for_one_rate(served: Served) -> None:
    let_all_answer(served)
    key = served.key(requests_per_minute=len(SOURCES))
    headers = {"authorization": f"Bearer {key.secret}"}
    with httpx.Client(base_url=served.proxy.url, headers=headers, timeout=60) as http:
        replies = [ask_any(http, source) for source in SOURCES]
        remaining = [int(reply.headers["x-ratelimit-remaining-requests"]) for reply in replies]
        refused = [ask_any(http, source) for source in SOURCES]

    assert {reply.status_code for reply in replies} == {200}
    assert remaining == sorted(remaining, reverse=True)
    assert {reply.status_code for reply in refused} == {429}
    assert all(int(reply.headers["retry-after"]) > 0 for reply in refused)


@EVERY_NATIVE_API
def test_what_no_chat_body_can_hold_is_reserved_and_billed_where_it_is_sent(served: Served, api: APIName) -> None:
    let_all_answer(served)
    key = served.key(usd_per_day=0.5)
    found = "x" * 400_000
    hidden: dict[str, Any] = {
        "messages": {"tools": [{"type": "web_search_20260209", "name": "web_search", "blocked": [found]}]},
        "responses": {"tools": [{"type": "web_search", "filters": {"blocked": [found]}}]},
    }
    headers = {"authorization": f"Bearer {key.secret}"}
    body = pinned(api, "native", **hidden[api], **{LIMIT_NAMES.get(api, "max_tokens"): 10})
    reply = httpx.post(served.proxy.url + PATHS[api], json=body, headers=headers, timeout=60)

    assert reply.status_code == 429
    assert served.native.history == []

    rich = served.key(usd_per_day=500)
    served.native.skill_by_path = {}
    served.native.then(Step(events=[b"".join(EVENTS[api][1:10])], done=False))
    httpx.post(
        served.proxy.url + PATHS[api],
        json={**body, "stream": True},
        headers={"authorization": f"Bearer {rich.secret}"},
        timeout=60,
    )
    assert wait_until(lambda: len(served.records(rich)) == 1)
    assert (served.records(rich)[0]["ending"], rich.spent_usd > 100_000 * PRICE) == ("broken", True)


# One conversation in every API.

SYSTEM, FIRST, RESULT, LAST = "Be brief.", "What is in this picture?", "a cat", "And what does it do?"
IMAGE = "data:image/png;base64,iVBORw0KGgo="
CALL_ID, ARGUMENTS = "call_1a2b", '{"place":"left"}'
CONVERSATION: dict[str, dict[str, Any]] = {
    "chat": {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {
                "role": "user",
                "content": [{"type": "text", "text": FIRST}, {"type": "image_url", "image_url": {"url": IMAGE}}],
            },
            {
                "role": "assistant",
                "content": "Let me look.",
                "tool_calls": [
                    {"id": CALL_ID, "type": "function", "function": {"name": "look", "arguments": ARGUMENTS}}
                ],
            },
            {"role": "tool", "tool_call_id": CALL_ID, "content": RESULT},
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": LAST},
        ]
    },
    "messages": {
        "system": SYSTEM,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": FIRST},
                    {
                        "type": "image",
                        "source": {"type": "base64", "media_type": "image/png", "data": IMAGE.partition(",")[2]},
                    },
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "Let me look."},
                    {"type": "tool_use", "id": CALL_ID, "name": "look", "input": json.loads(ARGUMENTS)},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": CALL_ID, "content": RESULT}]},
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": LAST},
        ],
    },
    "responses": {
        "instructions": SYSTEM,
        "input": [
            {
                "role": "user",
                "content": [{"type": "input_text", "text": FIRST}, {"type": "input_image", "image_url": IMAGE}],
            },
            {"role": "assistant", "content": [{"type": "output_text", "text": "Let me look."}]},
            {"type": "function_call", "call_id": CALL_ID, "name": "look", "arguments": ARGUMENTS},
            {"type": "function_call_output", "call_id": CALL_ID, "output": RESULT},
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": LAST},
        ],
    },
}


@pytest.mark.parametrize("api", ["messages", "responses"])
def test_one_conversation_is_the_same_to_a_chat_model_whichever_api_it_came_in(
    http: httpx.Client, served: Served, api: APIName
) -> None:
    sent = []
    for spoken in ("chat", api):
        body = {**pinned("chat", "seeing"), **CONVERSATION[spoken]}
        body |= {"max_tokens": 100} if api == "messages" else {}
        if spoken == "responses":
            del body["messages"]
        reply = http.post(PATHS[spoken], json=body)
        assert reply.status_code == 200, reply.text
        sent.append(served.other.last.body["messages"])

    assert sent[0] == sent[1]


# Responses that are kept.


def respond(http: httpx.Client, text: str, previous: str | None = None, **more: Any) -> dict[str, Any]:
    body = pinned("responses", **more, previous_response_id=previous)
    reply = http.post("/v1/responses", json={**body, "input": text})
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def test_a_long_conversation_goes_on_by_its_last_id_alone(http: httpx.Client, served: Served) -> None:
    answer: dict[str, Any] = {"id": None}
    for turn in range(100):
        answer = respond(http, f"turn {turn}", answer["id"])
    sent = served.chat.last.body["messages"]

    assert [message["content"] for message in sent if message["role"] == "user"] == [f"turn {n}" for n in range(100)]
    assert len(sent) == 199
    listed = http.get(f"/v1/responses/{answer['id']}/input_items", params={"limit": 100, "order": "asc"}).json()
    assert (len(listed["data"]), listed["has_more"]) == (100, True)


def test_a_conversation_goes_on_when_the_model_that_answered_is_gone(http: httpx.Client, served: Served) -> None:
    entry = model_entry("leaving", served.other.url, price=PRICE)
    served.proxy.admin("POST", "/admin/models", {**entry, "profile": uniform_profile(0.1)})
    assert wait_until(lambda: http.get("/v1/models/leaving").status_code == 200)
    first = respond(http, "first", model="leaving")
    served.proxy.admin("DELETE", "/admin/models/leaving")
    assert wait_until(lambda: http.get("/v1/models/leaving").status_code == 404)
    second = respond(http, "second", first["id"])

    assert (first["model"], second["model"]) == ("leaving", "chat")
    assert [message["content"] for message in served.chat.last.body["messages"]][::2] == ["first", "second"]


def test_what_is_not_to_be_kept_is_not(http: httpx.Client, served: Served) -> None:
    named = a_response(id="resp_of_native")
    last = event({"type": "response.completed", "response": named})
    served.native.then(Step(body=named), Step(events=[*RESPONSE_EVENTS[:-1], last], done=False))
    ours = respond(http, "x", store=False)["id"]
    assert respond(http, "x", model="native", store=False)["id"] == named["id"]
    assert (
        last.replace(b'"theirs"}', b'"native"}')[-30:] in raw_stream(http, "responses", model="native", store=False)[1]
    )

    assert [http.get(f"/v1/responses/{each}").status_code for each in (ours, named["id"])] == [404, 404]


def test_without_a_store_responses_are_answered_and_what_needs_them_says_so(http: httpx.Client, served: Served) -> None:
    kept = respond(http, "x")["id"]
    info: Any = served.store.info("server")
    with frozen(int(info["process_id"])):
        answered = respond(http, "y")
        refused = [
            http.get(f"/v1/responses/{kept}"),
            http.delete(f"/v1/responses/{kept}"),
            http.post("/v1/responses", json={**pinned("responses"), "previous_response_id": kept}),
        ]

    assert answered["status"] == "completed"
    assert [reply.status_code for reply in refused] == [503] * 3
    assert {reply.json()["error"]["code"] for reply in refused} == {"unavailable"}
    assert wait_until(lambda: http.get(f"/v1/responses/{kept}").status_code == 200)


# Attacks.


@pytest.mark.parametrize("api", ["messages", "responses", "completions"])
def test_a_stream_without_end_is_not_held_without_end(http: httpx.Client, served: Served, api: APIName) -> None:
    """The limits are max_answer_bytes, and some bytes for each of many small chunks."""
    chunk = {"choices": [{"index": 0, "delta": {"content": "x" * 1_000_000}, "finish_reason": None}]}
    served.chat.then(Step(events=[chunk] * 25))
    reply = ask(http, api, pinned(api, stream=True))

    assert ("max_answer_bytes" in reply.errors[0]["message"], reply.complete) == (True, False)
    assert 18_000_000 < len(reply.text) < 21_000_000


ODD = "a\r\nx-evil: 1\r\n\r\n\u2028\u00e9\x00\x7f" + "n" * 500


@pytest.mark.parametrize(
    ("api", "more"),
    [
        pytest.param("messages", {"tools": [{"type": ODD, "name": "x"}]}, id="a tool"),
        pytest.param("messages", {ODD: 1}, id="a field"),
        pytest.param("messages", {"metadata": {ODD: "x"}}, id="metadata"),
        pytest.param("responses", {"tools": [{"type": ODD}]}, id="a tool "),
        pytest.param("responses", {ODD: 1}, id="a field "),
        pytest.param("responses", {"include": [ODD] * 100}, id="include"),
        pytest.param("responses", {"input": [{"role": "user", "content": "x"}, {"type": ODD}]}, id="an item"),
        pytest.param("responses", {"tools": [{"type": "function", "name": "f", ODD: 1}]}, id="of a tool"),
    ],
)
def test_what_was_left_out_adds_nothing_but_one_header(
    http: httpx.Client, served: Served, api: APIName, more: dict[str, Any]
) -> None:
    reply = http.post(PATHS[api], json=pinned(api, **more))

    assert reply.status_code == 200, reply.text
    assert "x-evil" not in reply.headers
    left_out = reply.headers["x-uniroute-left-out"]
    assert (left_out.isascii(), left_out.isprintable(), len(left_out) < 1100) == (True, True, True)
    assert "\nx-evil" not in served.proxy.log


@EVERY_API
@STREAMED_OR_NOT
def test_no_prompt_is_logged(http: httpx.Client, served: Served, api: APIName, stream: bool) -> None:
    prompt = "canary-of-the-prompt-5d1c"
    steps = [Step(), Step(status=400, body=error_body("no", "x", None)), Step(cut_after=2), Step(drop=True)]
    for step in steps:
        served.chat.then(step)
        with contextlib.suppress(httpx.HTTPError):
            http.post(PATHS[api], json=body_of(api, prompt, model="chat", stream=stream, strange=prompt))
    http.post(PATHS[api], content=json.dumps({"model": prompt, "messages": prompt, "input": prompt, "prompt": 1}))

    assert prompt not in served.proxy.log


# The server itself: its end, and what its protocol refuses.


@dataclass(frozen=True)
class Ending:
    """One server as `uniroute serve` runs it, that ends streams a second after it is told to end."""

    server: ServeCommand
    chat: ScriptedUpstream
    native: ScriptedUpstream


@pytest.fixture
def ending(tmp_path: Path, embedder_cache: Path) -> Iterator[Ending]:
    with ScriptedUpstream() as chat, ScriptedUpstream() as native:
        models = [
            model_entry("chat", chat.url),
            model_entry("native", native.url, api=list(NATIVE_APIS), supports_reasoning=True),
        ]
        config = {"model_list": models, "uniroute": {"profile": {"on_start": False}, "drain_s": 1}}
        file = tmp_path / "config.yaml"
        file.write_text(json.dumps(config))
        environ = environment(tmp_path / "data", embedder_cache, MODEL_API_KEY="sk-model")
        with ServeCommand("--config", file, environ=environ, log=tmp_path / "log.txt") as server:
            yield Ending(server, chat, native)


def test_a_server_refuses_odd_heads_and_ends_streams_in_the_shape_of_each_api(ending: Ending) -> None:
    url = ending.server.url
    for api in API_NAMES:
        reply = httpx.post(f"{url}{PATHS[api]}?{'x' * 9000}", json=pinned(api))
        assert (reply.status_code, reply.json().get("type")) == (414, "error" if api == "messages" else None)
    reply = httpx.get(f"{url}/v1/models", headers={"anthropic-version": "1", **{f"x-{n}": "" for n in range(150)}})
    assert (reply.status_code, reply.json()["request_id"]) == (431, reply.headers["request-id"])

    ending.chat.always = Step(message={"content": "word " * 1000}, drip_s=0.05)
    ending.native.then(*(Step(events=[b"".join(EVENTS[api][:10]), EVENTS[api][10]], drip_s=60) for api in NATIVE_APIS))
    with ThreadPoolExecutor() as pool:
        replies = {source: pool.submit(read_stream, url, *source) for source in [*CHATS, ("messages", "native")]}
        assert wait_until(lambda: len(ending.native.history) == 1)
        replies["responses", "native"] = pool.submit(read_stream, url, "responses", "native")
        assert wait_until(lambda: len(ending.chat.history) == len(CHATS) and len(ending.native.history) == 2)
        time.sleep(0.5)
        ending.server.stop(signal.SIGTERM)
        ended = {source: reply.result(60) for source, reply in replies.items()}

    errors = {source: [error["message"] for error in reply.errors] for source, reply in ended.items()}
    assert errors == {source: [SHUTTING_DOWN_MESSAGE] for source in ended}
    assert ended["messages", "native"].errors[0]["type"] == "overloaded_error"
    assert ended["responses", "native"].errors[0]["code"] == "server_error"
    assert "Traceback" not in ending.server.log


CHATS = [(api, "chat") for api in API_NAMES]


def read_stream(url: str, api: APIName, model: str) -> Reply:
    with httpx.Client(base_url=url, timeout=60) as http:
        return ask(http, api, pinned(api, model, stream=True))
