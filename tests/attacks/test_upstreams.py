from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.attacks.conftest import ADMIN, ASK, BOTH_MODES, PROVIDER_KEY, Attacked
from tests.support.proxy_process import model_entry, uniform_profile
from tests.support.scripted_answers import Step, sse
from tests.support.scripted_upstream import ScriptedUpstream

pytestmark = BOTH_MODES

CONTENT: Any = {"choices": [{"index": 0, "delta": {"content": "hé字"}, "finish_reason": None}]}
END: Any = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}


def ask(http: httpx.Client, *, stream: bool = False, model: str = "fair") -> httpx.Response:
    return http.post("/v1/chat/completions", json={"model": model, "messages": ASK, "stream": stream})


def contents(reply: httpx.Response) -> str:
    data = [line.removeprefix("data: ") for line in reply.text.split("\n") if line.startswith("data: ")]
    chunks = [json.loads(line) for line in data if line != "[DONE]"]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308])
def test_no_redirect_is_followed(http: httpx.Client, attacked: Attacked, status: int, stream: bool) -> None:
    with ScriptedUpstream() as elsewhere:
        attacked.fair.then(Step(status=status, headers={"location": f"{elsewhere.url}/chat/completions"}, body=b""))
        reply = ask(http, stream=stream)

        assert reply.status_code == 502
        assert "redirect" in reply.json()["error"]["message"]
        assert "location" not in reply.headers
        assert elsewhere.history == attacked.good.history == []


def test_headers_of_an_upstream_are_neither_kept_nor_passed_on(http: httpx.Client, attacked: Attacked) -> None:
    """Cookies, alternative services, refreshes: none of an upstream's headers steers the client or the next call."""
    headers = {"set-cookie": "a=b; path=/", "alt-svc": 'h2="evil:443"', "refresh": "0;url=http://evil", "x-evil": "1"}
    attacked.fair.then(Step(headers=headers), Step())
    first, _ = ask(http), ask(http)

    assert not {*headers} & {*first.headers}
    assert "cookie" not in attacked.fair.last.headers


def test_headers_of_a_caller_do_not_reach_the_upstream(http: httpx.Client, attacked: Attacked) -> None:
    own = {"authorization": "Bearer callers", "cookie": "a=b", "x-forwarded-for": "1.2.3.4", "openai-organization": "o"}
    own |= {"x-api-key": "callers", "anthropic-beta": "x", "x-stainless-lang": "x", "user-agent": "callers", "via": "x"}
    http.post("/v1/chat/completions", json={"model": "fair", "messages": ASK}, headers=own)
    seen = attacked.fair.last.headers

    assert seen["authorization"] == f"Bearer {PROVIDER_KEY}"
    assert not any("callers" in value for value in seen.values())
    assert not {"cookie", "x-forwarded-for", "openai-organization", "anthropic-beta", "x-api-key", "via"} & set(seen)


@pytest.mark.parametrize(
    ("events", "content"),
    [
        ([CONTENT, END, b"data: [DONE]\n\ndata: [DONE]\n\n"], "hé字"),
        ([b": ping\n\n", CONTENT, b"event: x\nid: 7\nretry: 1\n\n", END], "hé字"),
        ([b"data:" + json.dumps(CONTENT, ensure_ascii=False).encode() + b"\r\n\r\n", END], "hé字"),
        ([b"\xef\xbb\xbfdata: " + json.dumps(CONTENT).encode() + b"\n\n", END], "hé字"),
        ([*[CONTENT] * 500, END], "hé字" * 500),
        ([{"choices": [{"index": 0, "delta": {"content": "x" * 3_000_000}}]}, END], "x" * 3_000_000),
    ],
)
def test_odd_but_complete_streams_arrive(
    http: httpx.Client, attacked: Attacked, events: list[Any], content: str
) -> None:
    attacked.fair.then(Step(events=events))
    reply = ask(http, stream=True)

    assert contents(reply) == content
    assert reply.text.count("[DONE]") == 1


def test_characters_cut_in_two_by_the_network_arrive_whole(http: httpx.Client, attacked: Attacked) -> None:
    raw = b"data: " + json.dumps(CONTENT, ensure_ascii=False).encode() + b"\n\n"
    attacked.fair.then(Step(events=[*(bytes((byte,)) for byte in raw), END], drip_s=0.001))

    assert contents(ask(http, stream=True)) == "hé字"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("retry_after", ["7", "Wed, 21 Oct 2065 07:28:00 GMT", None, "", "-1", "nan", "x" * 300])
def test_status_429_is_passed_on_with_or_without_retry_after(
    http: httpx.Client, attacked: Attacked, retry_after: str | None, stream: bool
) -> None:
    headers = {} if retry_after is None else {"retry-after": retry_after}
    attacked.fair.always = Step(status=429, headers=headers, body={"error": {"message": "slow down"}})
    reply = ask(http, stream=stream)

    passed_on = {"7": "7", "Wed, 21 Oct 2065 07:28:00 GMT": "3600"}.get(retry_after or "")
    assert (reply.status_code, reply.json()["error"]["message"]) == (429, "slow down")
    assert reply.headers.get("retry-after") == passed_on


def test_a_model_that_is_removed_while_it_answers_finishes(http: httpx.Client, attacked: Attacked) -> None:
    entry = model_entry("leaving", attacked.good.url)
    assert http.post("/admin/models", json={**entry, "profile": uniform_profile(0.9)}, headers=ADMIN).status_code == 201
    attacked.good.then(Step(events=[CONTENT, *[b": wait\n\n"] * 10, CONTENT, END], drip_s=0.02))
    question = {"model": "leaving", "messages": ASK, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=question) as reply:
        lines = reply.iter_lines()
        first = next(lines)
        removed = http.delete("/admin/models/leaving", headers=ADMIN)
        rest = "\n".join(lines)

    assert (removed.status_code, "hé字" in first, rest.count("hé字"), "[DONE]" in rest) == (204, True, 1, True)
    assert ask(http, model="leaving").status_code == 404


@pytest.mark.parametrize(
    "address",
    ["file:///etc/passwd", "ftp://x/", "gopher://x", "//x", "http://", "http:///x", "unix:///x", "http://u:p@x/", "x",
     "", "http://[::1", "javascript:alert(1)", "http://\x00", 7, ["http://x"], {"url": "http://x"}],
)  # fmt: skip
@pytest.mark.parametrize("name", ["api_base", "base_url"])
def test_an_invalid_address_cannot_be_added(http: httpx.Client, name: str, address: Any) -> None:
    params = {"model": "openai/x", name: address}
    body = {"model_name": "odd", "litellm_params": params, "model_info": {"free": True}, "profile": {"prompts": 20}}
    reply = http.post("/admin/models", json=body, headers=ADMIN)

    assert reply.status_code == 400, reply.text
    assert http.get("/admin/models/odd", headers=ADMIN).status_code == 404


EVENTS = st.lists(
    st.sampled_from([CONTENT, END, b": ping\n\n", b"data: [DONE]\n\n", {"choices": []}, {"error": {"message": "no"}}]),
    max_size=5,
)


@given(EVENTS, st.data())
@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_client_reads_the_same_for_every_split(
    http: httpx.Client, attacked: Attacked, events: list[Any], data: st.DataObject
) -> None:
    """The whole way: one upstream that writes the events as they are, one that cuts their bytes anywhere."""
    raw = b"".join(sse(event) for event in events)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=6)))
    pieces = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    attacked.fair.script.clear()
    attacked.fair.then(Step(events=[raw], done=False), Step(events=pieces, done=False))
    whole, split = ask(http, stream=True), ask(http, stream=True)

    assert (split.status_code, split.text) == (whole.status_code, whole.text)
    if whole.status_code == 200:
        assert whole.text.count("[DONE]") + whole.text.count('data: {"error"') == 1
