from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.proxy_process import ProxyProcess, model_entry
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until

IMAGE: Any = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 400_000}}
CALL: Any = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
ABILITIES = ("function_calling", "parallel_function_calling", "vision", "pdf_input", "response_schema", "reasoning")


def supporting(*able: str) -> dict[str, bool]:
    return {f"supports_{ability}": ability in able for ability in ABILITIES}


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream() as started:
        yield started


@pytest.fixture(scope="module")
def proxy(
    tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path, server: ScriptedUpstream
) -> Iterator[ProxyProcess]:
    """Serve three models. plain is the cheapest and has 1,000 tokens and no abilities; agent calls tools; seer sees."""
    folder = tmp_path_factory.mktemp("eligibility")
    config = {
        "model_list": [
            model_entry("plain", server.url, price=1e-7, max_input_tokens=1000, **supporting()),
            model_entry("agent", server.url, price=1e-6, **supporting("function_calling", "response_schema")),
            model_entry("seer", server.url, price=1e-5, max_output_tokens=500, **supporting("vision", "pdf_input")),
        ],
        "uniroute": {"profile": {"on_start": False}},
    }
    with ProxyProcess(folder, embedder_cache, config, {"MODEL_API_KEY": "k"}) as started:
        for name in ("plain", "agent", "seer"):
            started.put_profile(name, 0.2)
        yield started


def ask(proxy: ProxyProcess, content: Any = "Who was the first person on the moon?", **body: Any) -> httpx.Response:
    whole = {"model": "auto", "messages": [{"role": "user", "content": content}], **body}
    return httpx.post(f"{proxy.url}/v1/chat/completions", json=whole, timeout=60)


@pytest.mark.parametrize(
    ("body", "model"),
    [
        ({}, "plain"),
        ({"tools": [TOOL]}, "agent"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}}, "agent"),
        ({"response_format": {"type": "json_object"}}, "plain"),
        ({"reasoning_effort": "none"}, "plain"),
        ({"content": [{"type": "text", "text": "What is this?"}, IMAGE]}, "seer"),
        ({"content": [{"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA"}}]}, "seer"),
        ({"max_tokens": 64_000}, "plain"),
        ({"content": "word " * 2000}, "agent"),
        ({"provider": {"ignore": ["plain"]}}, "agent"),
        ({"provider": {"only": ["seer", "agent"], "ignore": ["agent"]}}, "seer"),
    ],
)
def test_the_cheapest_model_that_can_take_a_request_answers_it(
    proxy: ProxyProcess, body: dict[str, Any], model: str
) -> None:
    answer = ask(proxy, **body)

    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (
            {"tools": [TOOL], "content": [IMAGE]},
            "no_eligible_model",
            "no model can take this request, which needs a model to call tools (`tools`), to read images (messages[0] "
            "has image_url) (agent: cannot read images; plain: cannot call tools, cannot read images; "
            "seer: cannot call tools)",
        ),
        (
            {"tools": [TOOL], "parallel_tool_calls": True},
            "no_eligible_model",
            "to call several tools in one turn (`parallel_tool_calls`)",
        ),
        (
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [CALL, CALL]}]},
            "no_eligible_model",
            "(messages[1] has 2 tool_calls)",
        ),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 9}},
            "no_eligible_model",
            "parameters (`thinking`)",
        ),
        ({"provider": {"max_price": {"prompt": 0.01}}}, "no_eligible_model", "input price above 0.01 USD per million"),
        ({"provider": {"ignore": ["plain", "agent", "seer"]}}, "no_eligible_model", "leave no model"),
        (
            {"content": "word " * 2000, "models": ["plain"], "max_tokens": 5},
            "context_length_exceeded",
            "plain: context window below about 25",
        ),
        (
            {"content": "word " * 790, "models": ["plain"], "max_tokens": 600},
            "context_length_exceeded",
            "prompt tokens and an answer",
        ),
    ],
)
def test_a_request_without_an_eligible_model_says_which_requirement_excludes_which_model(
    proxy: ProxyProcess, body: dict[str, Any], code: str, message: str
) -> None:
    refused = ask(proxy, **body)
    error = refused.json()["error"]

    assert (refused.status_code, error["code"], error["type"]) == (400, code, "invalid_request_error")
    assert message in error["message"]


def test_the_dry_run_lists_every_requirement_that_a_model_fails(proxy: ProxyProcess) -> None:
    body = {"model": "auto", "messages": [{"role": "user", "content": [IMAGE]}], "reasoning_effort": "high"}
    pinned = {**body, "model": "plain"}
    decision = httpx.post(f"{proxy.url}/v1/route", json={**body, "reasoning_effort": None}, timeout=60).json()
    served = httpx.post(f"{proxy.url}/v1/chat/completions", json=pinned, timeout=60)

    assert decision["ineligible"] == [
        {"model": "agent", "why": "cannot read images"},
        {"model": "plain", "why": "cannot read images"},
    ]
    assert (served.status_code, served.headers["x-uniroute-reason"]) == (200, "pinned")


CAP: Any = {"model": "auto", "models": ["seer"], "messages": [{"role": "user", "content": "hi"}], "max_tokens": 64_000}


@pytest.mark.parametrize("stream", [False, True])
def test_a_token_limit_above_the_models_own_is_lowered_and_the_response_says_so(
    proxy: ProxyProcess, server: ScriptedUpstream, *, stream: bool
) -> None:
    answer = httpx.post(f"{proxy.url}/v1/chat/completions", json={**CAP, "stream": stream}, timeout=60)

    assert (answer.status_code, answer.headers["x-uniroute-max-tokens"]) == (200, "500")
    assert (server.last.body["max_tokens"], server.last.body.get("models")) == (500, None)
    assert wait_until(lambda: " max_tokens=64000>500\n" in proxy.log)


def test_the_dry_run_shows_what_a_model_would_be_sent(proxy: ProxyProcess) -> None:
    decision = httpx.post(f"{proxy.url}/v1/route", json=CAP, timeout=60).json()
    unstated = httpx.post(f"{proxy.url}/v1/route", json={**CAP, "max_tokens": None}, timeout=60).json()

    assert (decision["max_tokens"], unstated["max_tokens"]) == ({"stated": 64_000, "sent": 500}, None)


def test_a_pinned_model_is_sent_what_the_caller_requested(proxy: ProxyProcess, server: ScriptedUpstream) -> None:
    answer = httpx.post(f"{proxy.url}/v1/chat/completions", json={**CAP, "model": "seer", "models": None}, timeout=60)

    assert "x-uniroute-max-tokens" not in answer.headers
    assert server.last.body["max_tokens"] == 64_000
