from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import httpx
import openai
import pytest

from tests.server.ranked_proxy import ASK, RankedProxy, ask
from tests.server.test_streaming import read_stream, text_of
from tests.support.proxy_process import ProxyProcess, model_entry
from tests.support.scripted_answers import Step, error_body, sse
from tests.support.scripted_upstream import ScriptedUpstream


@pytest.mark.parametrize("stream", [False, True])
def test_a_connection_that_died_without_a_byte_is_retried(
    asking: httpx.Client, ranked: RankedProxy, stream: bool
) -> None:
    ranked.models[0].then(Step(drop=True))
    reply = ask(asking, stream=stream)

    assert (reply.headers["x-uniroute-model"], reply.headers["x-uniroute-reason"]) == ("first", "scored")
    assert ranked.request_counts == [2, 0, 0, 0]


@pytest.mark.parametrize("stream", [False, True])
def test_a_connection_that_dies_twice_is_retried_once_only(
    asking: httpx.Client, ranked: RankedProxy, stream: bool
) -> None:
    ranked.models[0].then(Step(drop=True), Step(drop=True))
    assert ask(asking, stream=stream).headers["x-uniroute-model"] == "second"
    assert ranked.request_counts == [2, 1, 0, 0]


def test_a_pinned_model_is_retried_too(asking: httpx.Client, ranked: RankedProxy) -> None:
    ranked.models[3].then(Step(drop=True))
    assert ask(asking, model="fourth").json()["choices"][0]["message"]["content"] == "The fourth answer."


@pytest.mark.parametrize("stream", [False, True])
def test_no_more_than_three_models_are_attempted(asking: httpx.Client, ranked: RankedProxy, stream: bool) -> None:
    for model in ranked.models:
        model.always = Step(status=503, body=error_body("down", "server_error", None))
    reply = ask(asking, stream=stream)

    assert (reply.status_code, reply.json()["error"]["message"]) == (503, "down")
    assert ranked.request_counts == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, "This model's maximum context length is 4096 tokens."),
        (400, "prompt is too long: 210000 tokens > 200000 maximum"),
        (413, "the request exceeds the available context size"),
    ],
)
def test_a_prompt_too_long_for_one_model_falls_back_to_the_next(
    asking: httpx.Client, ranked: RankedProxy, status: int, words: str
) -> None:
    ranked.models[0].then(Step(status=status, body=error_body(words, "invalid_request_error", None)))
    assert ask(asking).headers["x-uniroute-model"] == "second"


def test_a_prompt_too_long_for_the_only_model_has_its_own_error_code(ranked: RankedProxy) -> None:
    ranked.models[0].then(Step(status=400, body={"error": {"message": "maximum context length is 8 tokens"}}))
    client = openai.OpenAI(base_url=f"{ranked.proxy.url}/v1", api_key="-", max_retries=0)
    with client, pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="first", messages=ASK)
    assert caught.value.code == "context_length_exceeded"


TOO_LONG = error_body("Context size has been exceeded.", "server_error", None)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "step",
    [Step(status=500, body=TOO_LONG), Step(body=TOO_LONG), Step(body=sse(TOO_LONG))],
    ids=["500", "200", "event"],
)
def test_a_prompt_too_long_falls_back_wherever_the_upstream_reports_it(
    asking: httpx.Client, ranked: RankedProxy, step: Step, stream: bool
) -> None:
    ranked.models[0].then(step)
    assert ask(asking, stream=stream).headers["x-uniroute-model"] == "second"


def test_a_prompt_too_long_falls_back_to_a_model_with_a_larger_context(tmp_path: Path, embedder_cache: Path) -> None:
    with ExitStack() as closing:
        small, smaller, large = (closing.enter_context(ScriptedUpstream()) for _ in range(3))
        windows = {"small": (small, 8000), "smaller": (smaller, 4000), "large": (large, 32_000)}
        entries = [model_entry(name, server.url, max_input_tokens=most) for name, (server, most) in windows.items()]
        config = {
            "model_list": entries,
            "uniroute": {"profile": {"on_start": False}},
        }
        proxy = closing.enter_context(ProxyProcess(tmp_path, embedder_cache, config, {"MODEL_API_KEY": "k"}))
        for place, name in enumerate(windows):
            proxy.put_profile(name, 0.1 + 0.1 * place)
        small.always = Step(status=400, body=TOO_LONG)
        with httpx.Client(base_url=proxy.url, timeout=60) as http:
            assert ask(http).headers["x-uniroute-model"] == "large"
            assert smaller.history == []
            large.always = small.always
            refused = ask(http)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_stream_that_never_reaches_content_fails_its_attempt(asking: httpx.Client, ranked: RankedProxy) -> None:
    nothing = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
    ranked.models[0].then(Step(events=[nothing] * 1500))
    assert text_of(read_stream(asking, model="auto")[1]) == "The second answer."


def test_a_response_without_end_is_abandoned(asking: httpx.Client, ranked: RankedProxy) -> None:
    ranked.models[0].then(Step(flood=True))
    assert ask(asking).headers["x-uniroute-model"] == "second"
    assert ranked.models[0].last.client_left.wait(60)


def test_an_html_page_with_status_200_fails_its_attempt(asking: httpx.Client, ranked: RankedProxy) -> None:
    page = b"<html><body>Please log in to the network</body></html>"
    for stream in (False, True):
        ranked.models[0].then(Step(headers={"content-type": "text/html"}, body=page))
        assert ask(asking, stream=stream).headers["x-uniroute-model"] == "second"


def test_a_model_that_gets_what_time_others_left_is_not_blamed_for_its_timeout(
    tmp_path: Path, embedder_cache: Path
) -> None:
    with ScriptedUpstream() as slow, ScriptedUpstream() as late:
        config = {
            "model_list": [model_entry("slow", slow.url), model_entry("late", late.url)],
            "uniroute": {
                "profile": {"on_start": False},
                "first_token_timeout_s": 1,
                "request_timeout_s": 1.5,
                "breaker": {"failures": 1, "share": 0.01, "cooldown_s": 600, "longest_cooldown_s": 600},
            },
        }
        with ProxyProcess(tmp_path, embedder_cache, config, {"MODEL_API_KEY": "k"}) as proxy:
            proxy.put_profile("slow", 0.1)
            proxy.put_profile("late", 0.2)
            slow.always = late.always = Step(hang=True)
            with httpx.Client(base_url=proxy.url, timeout=60) as http:
                assert ask(http).status_code == 504
            states = {
                card["model_name"]: card["health"]["state"]
                for card in proxy.admin("GET", "/admin/models").json()["models"]
            }

    assert (len(slow.history), len(late.history)) == (1, 1)
    assert states == {"slow": "resting", "late": "well"}
