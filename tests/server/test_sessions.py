"""Tool loops, thinking and sessions over two server processes that share one Valkey, with the official client."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import redis

from proxy.storage.valkey import EmbeddedValkey
from tests.support.proxy_process import ProxyProcess, model_entry
from tests.support.scripted_answers import Step
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until

ASK: Any = [{"role": "user", "content": "What is the weather in Paris, and what should I wear there today?"}]
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
# Chooses "good"; without it "fair" is.
BEST = {"lambda": "0"}
SIGNATURE = "EqQBCgIYAhIM1gbcDa9GJwZA2b3hGgxBdjrkzLoky3dl1pkiMOYds"


@dataclass(frozen=True)
class Pair:
    """Hold two processes over one Valkey. "warm" and "cold" differ in price alone; the cache of "warm" can halve it."""

    proxies: tuple[ProxyProcess, ProxyProcess]
    fair: ScriptedUpstream
    good: ScriptedUpstream
    valkey: redis.Redis

    def client(self, number: int) -> openai.OpenAI:
        base_url = f"{self.proxies[number].url}/v1"
        return openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=60)

    def ask(
        self, number: int, messages: Any, headers: dict[str, str] | None = None, **body: Any
    ) -> tuple[Any, tuple[str, str]]:
        """Return the message, its model and the reason."""
        with self.client(number) as client:
            raw = client.chat.completions.with_raw_response.create(
                model=body.pop("model", "auto"), messages=messages, extra_headers=headers or {}, **body
            )
        message = raw.parse().choices[0].message.model_dump(exclude_none=True)
        return message, (raw.headers["x-uniroute-model"], raw.headers["x-uniroute-reason"])

    def remembered(self) -> int:
        return len(self.valkey.keys("uniroute:conversation:*"))

    def settled(self) -> int:
        """Return how many are remembered once what the requests before have left behind has been written too."""
        found, before = self.remembered(), -1
        while found != before:
            time.sleep(0.2)
            found, before = self.remembered(), found
        return found

    def looked_up(self) -> int:
        stats: Any = self.valkey.info("commandstats")
        return int(stats.get("cmdstat_mget", {}).get("calls", 0))


@pytest.fixture(scope="module", params=["relay", "translate"])
def both(
    tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path, request: pytest.FixtureRequest
) -> Iterator[Pair]:
    mode = {"forward": request.param}
    folder = tmp_path_factory.mktemp("pair")
    server = EmbeddedValkey(folder / "valkey")
    server.ensure()
    environ = {"MODEL_API_KEY": "sk-x", "UNIROUTE_REDIS_URL": f"unix://{server.socket_path}"}
    with ScriptedUpstream() as fair, ScriptedUpstream() as good:
        expensive, cached = {"price": 1e-5, "output_cost_per_token": 0.0}, {"cache_read_input_token_cost": 1e-6}
        config = {
            "model_list": [
                model_entry("fair", fair.url, price=1e-7, supports_function_calling=True, **mode),
                model_entry("good", good.url, price=1e-5, supports_function_calling=True, **mode),
                model_entry("warm", good.url, **expensive, **cached, **mode),
                model_entry("cold", fair.url, price=4e-6, output_cost_per_token=0.0, **mode),
            ],
            "uniroute": {"profile": {"on_start": False}},
        }
        with (
            ProxyProcess(folder / "one", embedder_cache, config, environ) as one,
            ProxyProcess(folder / "two", embedder_cache, config, environ) as two,
            redis.Redis(unix_socket_path=str(server.socket_path)) as store,
        ):
            for name, error in {"fair": 0.3, "good": 0.1, "warm": 0.2, "cold": 0.2}.items():
                one.put_profile(name, error)
            assert wait_until(lambda: two.admin("GET", "/admin/models/cold").json()["state"] == "ready")
            yield Pair((one, two), fair, good, store)
    server.stop()


@pytest.fixture
def pair(both: Pair) -> Pair:
    for upstream in (both.fair, both.good):
        upstream.script.clear()
        upstream.history.clear()
    return both


def calling(call_id: str, city: str = "Paris") -> Step:
    call = {"id": call_id, "type": "function", "function": {"name": "weather", "arguments": f'{{"city":"{city}"}}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    return Step(message=message, finish_reason="tool_calls")


def result(message: Any) -> Any:
    return {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "Rain."}


@pytest.mark.parametrize("ids", [("call_9pw1qnYScqvGrC", "call_H58HWCvFH6aa01"), ("call_0", "call_0")])
def test_a_tool_loop_stays_with_its_model_across_processes(pair: Pair, ids: tuple[str, str]) -> None:
    question = [{**ASK[0], "content": f"{ASK[0]['content']} {ids[0]}"}]
    pair.good.then(calling(ids[0]), calling(ids[1], "Rome"), Step(message={"role": "assistant", "content": "A coat."}))
    before = pair.settled()
    first, model_and_reason = pair.ask(0, question, BEST, tools=TOOLS)
    assert model_and_reason == ("good", "scored")
    assert wait_until(lambda: pair.remembered() == before + 1)

    loop = [*question, first, result(first)]
    second, model_and_reason = pair.ask(1, loop, tools=TOOLS)
    assert model_and_reason == ("good", "sticky")
    assert wait_until(lambda: pair.remembered() == before + 2)

    last, model_and_reason = pair.ask(0, [*loop, second, result(second)], tools=TOOLS)
    assert (last["content"], model_and_reason) == ("A coat.", ("good", "sticky"))
    assert pair.fair.history == []

    _, model_and_reason = pair.ask(1, [*loop, second, result(second), last, *ASK], tools=TOOLS)
    assert model_and_reason == ("fair", "scored")  # the loop is over


def test_a_streamed_tool_call_keeps_its_model_too(pair: Pair) -> None:
    before = pair.settled()
    pair.good.then(calling("call_9pw1qnYScqvStr"))
    with pair.client(0) as client:
        stream = client.chat.completions.create(
            model="auto", messages=ASK, tools=TOOLS, stream=True, extra_headers=BEST
        )
        calls = [call for chunk in stream for choice in chunk.choices for call in choice.delta.tool_calls or ()]
    arguments = "".join(call.function.arguments or "" for call in calls if call.function)
    message = calling(calls[0].id or "").message
    assert arguments == '{"city":"Paris"}'
    assert wait_until(lambda: pair.remembered() == before + 1)
    _, model_and_reason = pair.ask(1, [*ASK, message, result(message)], tools=TOOLS)
    assert model_and_reason == ("good", "sticky")


def test_thinking_blocks_stay_with_the_model_that_signed_them_and_go_to_no_other(pair: Pair) -> None:
    thought = "It rains in Paris, so something against the rain is what should be worn there. " * 3
    deltas: list[Any] = [
        {"role": "assistant", "thinking_blocks": [{"type": "thinking", "thinking": thought[:40], "signature": None}]},
        {"thinking_blocks": [{"type": "thinking", "thinking": thought[40:], "signature": None}]},
        {"thinking_blocks": [{"type": "thinking", "thinking": "", "signature": SIGNATURE}]},
        {"content": "A coat."},
    ]
    events = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    pair.good.then(Step(events=[{"id": "c", "object": "chat.completion.chunk", **event} for event in (*events, end)]))
    before = pair.settled()
    with pair.client(0) as client:
        for _ in client.chat.completions.create(model="auto", messages=ASK, stream=True, extra_headers=BEST):
            pass
    assert wait_until(lambda: pair.remembered() == before + 2)  # the signature and the text

    blocks = [{"type": "thinking", "thinking": thought, "signature": SIGNATURE}]
    messages = [*ASK, {"role": "assistant", "content": "A coat.", "thinking_blocks": blocks}, *ASK]
    _, model_and_reason = pair.ask(1, messages)
    assert model_and_reason == ("good", "sticky")
    assert pair.good.last.body["messages"][1]["thinking_blocks"] == blocks

    pair.good.then(Step(status=500, body={"error": {"message": "down"}}))
    with pytest.raises(openai.InternalServerError):
        pair.ask(1, messages)
    assert pair.fair.history == []


def test_a_tool_loop_whose_model_fails_continues_elsewhere_only_if_asked(pair: Pair) -> None:
    failing = Step(status=500, body={"error": {"message": "down"}})
    pair.good.then(calling("call_9pw1qnYScqvFal"), failing, failing)
    first, _ = pair.ask(0, ASK, BEST, tools=TOOLS)
    loop = [*ASK, first, result(first)]
    with pytest.raises(openai.InternalServerError):
        pair.ask(0, loop, tools=TOOLS)
    assert pair.fair.history == []
    _, model_and_reason = pair.ask(0, loop, tools=TOOLS, extra_body={"uniroute": {"fallbacks": True}})
    assert model_and_reason == ("fair", "fallback")


def test_a_tool_loop_that_must_leave_its_model_is_counted_and_says_why(pair: Pair) -> None:
    def moved() -> float:
        metrics = httpx.get(f"{pair.proxies[0].url}/metrics", timeout=60).text
        (line,) = [line for line in metrics.splitlines() if line.startswith("uniroute_conversations_moved_total ")]
        return float(line.split()[1])

    pair.good.then(calling("call_9pw1qnYScqvMov"))
    first, _ = pair.ask(0, ASK, BEST, tools=TOOLS)
    body = {"model": "auto", "messages": [*ASK, first, result(first)], "uniroute": {"models": ["fair"]}}
    before = moved()
    reply = httpx.post(f"{pair.proxies[0].url}/v1/chat/completions", json=body, timeout=60)
    assert (reply.headers["x-uniroute-model"], moved()) == ("fair", before + 1)
    decision = httpx.post(f"{pair.proxies[0].url}/v1/route", json=body, timeout=60).json()
    assert "not among the models" in {row["model"]: row["why"] for row in decision["ineligible"]}["good"]
    assert wait_until(lambda: "cannot stay with model=good" in pair.proxies[0].log)


def session_turn(pair: Pair, session: str, tokens: int) -> tuple[str, str]:
    """Return the model that answers 1,000 tokens after "warm" answered this session with so many of them."""
    pair.good.then(Step(usage={"prompt_tokens": tokens - 50, "completion_tokens": 50, "total_tokens": tokens}))
    before = pair.settled()
    headers = {"x-session-id": session}
    pair.ask(0, ASK, headers, model="warm")
    assert wait_until(lambda: pair.remembered() == before + 1)
    body = {"uniroute": {"models": ["warm", "cold"]}}
    question = [{"role": "user", "content": "word " * 797}]
    with pair.client(1) as client:
        dry = client.post(
            "/route",
            body={"model": "auto", "messages": question, **body},
            options={"headers": headers},
            cast_to=httpx.Response,
        ).json()
    _, model_and_reason = pair.ask(1, question, headers, extra_body=body)
    assert (dry["model"], dry["reason"]) == model_and_reason
    return model_and_reason


def test_a_session_stays_with_its_model_while_the_prompt_cache_saves_money(pair: Pair) -> None:
    """Afresh "warm" costs $0.01 and "cold" $0.004; a cached token saves $9e-6, so that 667 of them make it cheaper."""
    assert session_turn(pair, "short", 660) == ("cold", "scored")
    assert session_turn(pair, "long", 670) == ("warm", "sticky")


def test_only_a_session_or_an_unknown_history_costs_a_round_trip(pair: Pair) -> None:
    pair.good.then(calling("call_9pw1qnYScqvTrp"))
    before = pair.looked_up()
    first, _ = pair.ask(0, ASK, BEST, tools=TOOLS)
    loop = [*ASK, first, result(first)]
    for messages in (ASK, loop, [*ASK, {"role": "assistant", "content": "A coat."}, *ASK]):
        pair.ask(0, messages, tools=TOOLS)
    assert pair.looked_up() == before

    pair.ask(1, loop, tools=TOOLS)
    pair.ask(1, loop, tools=TOOLS)
    assert pair.looked_up() == before + 1
    pair.ask(0, ASK, {"x-claude-code-session-id": "s"})
    assert pair.looked_up() == before + 2


def test_session_ids_are_in_no_log_and_no_reply(pair: Pair) -> None:
    with pair.client(0) as client:
        raw = client.chat.completions.with_raw_response.create(
            model="auto", messages=ASK, extra_body={"uniroute": {"session": "canary-of-a-session"}}
        )
    metrics = httpx.get(f"{pair.proxies[0].url}/metrics", timeout=60).text
    for text in (pair.proxies[0].log, raw.text, str(raw.headers), metrics, str(pair.fair.history)):
        assert "canary-of-a-session" not in text
