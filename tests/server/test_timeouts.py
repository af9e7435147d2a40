from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.ranked_proxy import RankedProxy, ask, error_of
from tests.server.test_streaming import read_stream, text_of
from tests.support.scripted_answers import Step

SOON = {"timeouts": {"first_token_s": 1.0}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_sends_nothing_is_abandoned_for_the_next(
    asking: httpx.Client, ranked: RankedProxy, stream: bool
) -> None:
    ranked.models[0].then(Step(hang=True))
    reply = ask(asking, stream=stream, uniroute=SOON)

    assert reply.status_code == 200
    assert (reply.headers["x-uniroute-model"], reply.headers["x-uniroute-reason"]) == ("second", "fallback")
    assert ranked.models[0].last.client_left.wait(60)


def test_a_stream_that_begins_without_content_is_abandoned_for_the_next(
    asking: httpx.Client, ranked: RankedProxy
) -> None:
    ranked.models[0].then(Step(message={"content": "late"}, drip_s=600))
    _, events = read_stream(asking, model="auto", uniroute=SOON)

    assert text_of(events) == "The second answer."


def test_the_error_names_the_timeout_that_expired(asking: httpx.Client, ranked: RankedProxy) -> None:
    ranked.models[0].then(Step(hang=True))
    reply = ask(asking, model="first", uniroute=SOON)

    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "upstream_timeout")
    assert "first gave no answer within 1 s (first_token_timeout_s)" in reply.json()["error"]["message"]


def test_all_attempts_share_one_deadline(asking: httpx.Client, ranked: RankedProxy) -> None:
    for model in ranked.models:
        model.always = Step(hang=True)
    reply = ask(asking, uniroute={"timeouts": {"first_token_s": 1.0, "total_s": 1.9}})

    assert reply.status_code == 504
    assert "request_timeout_s" in reply.json()["error"]["message"]
    assert ranked.request_counts == [1, 1, 0, 0]


def test_a_request_cannot_raise_a_timeout_above_the_settings(asking: httpx.Client, ranked: RankedProxy) -> None:
    ranked.models[0].then(Step(hang=True))
    reply = ask(asking, model="first", uniroute={"timeouts": {"total_s": 500, "first_token_s": 500}})

    assert reply.status_code == 504


def test_a_stream_that_falls_silent_ends_with_an_error(asking: httpx.Client, ranked: RankedProxy) -> None:
    ranked.models[0].then(Step(events=[_delta("So")], drip_s=600))
    _, events = read_stream(asking, model="auto")

    assert (text_of(events), "[DONE]" in events) == ("So", False)
    assert "silent for 1 s (idle_timeout_s)" in error_of(events)


def test_a_stream_that_never_ends_is_ended(asking: httpx.Client, ranked: RankedProxy) -> None:
    ranked.models[0].then(Step(message={"content": "drip " * 1000}, drip_s=0.1))
    _, events = read_stream(asking, model="auto")

    assert "stream_timeout_s" in error_of(events)


def test_a_model_may_have_timeouts_of_its_own(asking: httpx.Client, ranked: RankedProxy) -> None:
    body = {
        "model_name": "hasty",
        "litellm_params": {"model": "openai/hasty", "api_base": ranked.models[0].url},
        "model_info": {"free": True, "first_token_timeout_s": 0.25},
        "profile": {"prompts": 1, "max_usd": 0},
    }
    assert ranked.proxy.admin("POST", "/admin/models", body).status_code == 202
    ranked.models[0].always = Step(hang=True)
    reply = ask(asking, model="hasty")
    ranked.proxy.admin("DELETE", "/admin/models/hasty")

    assert "within 0.25 s" in reply.json()["error"]["message"]


def test_a_connection_that_is_not_accepted_times_out(asking: httpx.Client, ranked: RankedProxy) -> None:
    with full_backlog() as port:
        body = {
            "model_name": "deaf",
            "litellm_params": {"model": "openai/deaf", "api_base": f"http://127.0.0.1:{port}/v1"},
            "model_info": {"free": True, "connect_timeout_s": 0.3},
            "profile": {"prompts": 1, "max_usd": 0},
        }
        assert ranked.proxy.admin("POST", "/admin/models", body).status_code == 202
        reply = ask(asking, model="deaf")
        ranked.proxy.admin("DELETE", "/admin/models/deaf")
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "upstream_timeout")
    assert "gave no answer within" not in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("value", "param"),
    [
        (5, "uniroute.timeouts"),
        ({"first_tokens": 1}, "uniroute.timeouts"),
        ({"idle_s": 0}, "uniroute.timeouts.idle_s"),
        ({"idle_s": -1}, "uniroute.timeouts.idle_s"),
        ({"total_s": 5e-324}, "uniroute.timeouts.total_s"),
        ({"connect_s": 0.009}, "uniroute.timeouts.connect_s"),
        ({"total_s": "5"}, "uniroute.timeouts.total_s"),
    ],
)
def test_invalid_timeouts_are_refused(asking: httpx.Client, value: Any, param: str) -> None:
    reply = ask(asking, uniroute={"timeouts": value})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def _delta(words: str) -> dict[str, Any]:
    return {"id": "1", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": words}}]}


@contextlib.contextmanager
def full_backlog() -> Iterator[int]:
    """Open a port that accepts no connection: its queue is full."""
    with contextlib.ExitStack() as closing:
        listening = closing.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            waiting = closing.enter_context(socket.socket())
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(listening.getsockname())
        yield listening.getsockname()[1]
