"""Loops of tool calls over three models that fail at random: what one of them has begun reaches no other."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from tests.support.proxy_process import ProxyProcess, model_entry
from tests.support.scripted_answers import Json, Step
from tests.support.scripted_upstream import ScriptedUpstream

TOOLS = [{"type": "function", "function": {"name": "bash", "parameters": {"type": "object"}}}]
RESULTS = ("Exit code 1\n1 failed, 30 passed in 0.8s", "===== 31 passed in 0.8s =====")
# Cooldowns that begin soon and are over soon, so that a run sees many.
BREAKER = {"failures": 3, "share": 0.3, "window_s": 5, "cooldown_s": 0.2, "longest_cooldown_s": 0.5}
MODELS = {"small": (0.3, 1e-7), "medium": (0.2, 1e-6), "large": (0.1, 3e-6)}
CLIENTS, MAX_TRIES, RETRY_S = 6, 400, 0.02
FAILING = 0.25


class FailingUpstream(ScriptedUpstream):
    """Answer with calls and signatures of its own, or fail, as a seeded generator says."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.breaks: list[str] = []
        self._luck = Random(name)

    def _standing(self, path: str) -> Step:
        body = self.last.body
        self.breaks += [each for each in begun_elsewhere(body["messages"]) if f"-{self.name}-" not in each]
        kind = self._luck.random() / FAILING
        if kind < 0.5:
            status = self._luck.choice((429, 500, 502, 503))
            return Step(status=status, body={"error": {"message": "down"}}, headers={"retry-after": "0"})
        if kind < 0.7:
            return Step(drop=True)
        message = self._message(thinks="thinks" in body["messages"][0]["content"])
        if not body.get("stream"):
            return Step(message=message, finish_reason="tool_calls" if "tool_calls" in message else "stop")
        return Step(events=list(events_of(message)), cut_after=self._luck.randrange(4) if kind < 1 else None)

    def _message(self, *, thinks: bool) -> Json:
        number = f"{self._luck.getrandbits(96):024x}"
        message: Json = {"role": "assistant", "content": None}
        if thinks:
            signature = f"sig-{self.name}-{number * 3}"
            message["thinking_blocks"] = [
                {"type": "thinking", "thinking": f"Thought {number}.", "signature": signature}
            ]
        if self._luck.random() < 0.75:
            function = {"name": "bash", "arguments": json.dumps({"command": f"pytest -k {number[:4]}"})}
            message["tool_calls"] = [{"id": f"call-{self.name}-{number}", "type": "function", "function": function}]
        else:
            message["content"] = "I have done what I could."
        return message


def begun_elsewhere(messages: list[Json]) -> Iterator[str]:
    """Yield the ids of calls whose results are the newest turns, and all signatures."""
    for message in reversed(messages):
        if message["role"] != "tool":
            break
        yield message["tool_call_id"]
    for message in messages:
        for block in message.get("thinking_blocks") or ():
            yield block["signature"]


def events_of(message: Json) -> Iterator[Json | bytes]:
    deltas: list[Json] = [{"role": "assistant", "content": ""}]
    deltas += [{"thinking_blocks": [block]} for block in message.get("thinking_blocks", ())]
    deltas += [{"content": word} for word in (message["content"] or "").split(" ") if word]
    for call in message.get("tool_calls", ()):
        deltas.append({"tool_calls": [{**call, "index": 0, "function": {**call["function"], "arguments": ""}}]})
        text = call["function"]["arguments"]
        deltas += [
            {"tool_calls": [{"index": 0, "function": {"arguments": part}}]} for part in (text[:9], text[9:]) if part
        ]
    for delta in deltas:
        yield {"id": "c", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta}]}
    ended = "tool_calls" if "tool_calls" in message else "stop"
    yield {"id": "c", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {}, "finish_reason": ended}]}


def assembled(text: str) -> Json | None:
    """Return the message that a whole stream makes; None: it broke."""
    message: Json = {"role": "assistant", "content": ""}
    if "data: [DONE]" not in text or '"error"' in text:
        return None
    for line in text.splitlines():
        if not line.startswith("data: {"):
            continue
        for choice in json.loads(line[6:]).get("choices", ()):
            delta = choice.get("delta", {})
            message["content"] += delta.get("content") or ""
            message.setdefault("thinking_blocks", []).extend(delta.get("thinking_blocks", ()))
            for part in delta.get("tool_calls", ()):
                calls = message.setdefault("tool_calls", [])
                if "id" in part:
                    calls.append({"id": part["id"], "type": "function", "function": dict(part["function"])})
                else:
                    calls[-1]["function"]["arguments"] += part["function"]["arguments"]
    return message


@dataclass
class Fleet:
    proxy: ProxyProcess
    upstreams: dict[str, FailingUpstream]


@pytest.fixture
def fleet(tmp_path: Path, embedder_cache: Path) -> Iterator[Fleet]:
    upstreams = {name: FailingUpstream(name) for name in MODELS}
    for upstream in upstreams.values():
        upstream.start()
    config = {
        "model_list": [
            model_entry(name, upstreams[name].url, price=price, supports_function_calling=True)
            for name, (_, price) in MODELS.items()
        ],
        "uniroute": {"profile": {"on_start": False}, "breaker": BREAKER},
    }
    try:
        with ProxyProcess(tmp_path, embedder_cache, config, {"MODEL_API_KEY": "sk-x"}) as proxy:
            for name, (error, _) in MODELS.items():
                proxy.put_profile(name, error)
            yield Fleet(proxy, upstreams)
    finally:
        for upstream in upstreams.values():
            upstream.stop()


@dataclass
class Tally:
    """What the clients have seen, all together."""

    requests: int
    statuses: Counter[int] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    models: set[tuple[str, ...]] = field(default_factory=set)
    """Of each conversation, the models of its turns."""
    broken: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> bool:
        """Count a request; False: all have been made."""
        with self.lock:
            self.requests -= 1
            return self.requests >= 0


class AllMade(Exception):
    """All requests have been made."""


class Agent:
    """Hold conversations, one after the other, and ask again after each failure, as agents do."""

    def __init__(self, fleet: Fleet, tally: Tally, number: int) -> None:
        self._url = f"{fleet.proxy.url}/v1/chat/completions"
        self._tally = tally
        self._number = number
        self._luck = Random(number)

    def run(self) -> None:
        with httpx.Client(timeout=60) as client:
            for conversation in range(10**6):
                try:
                    self._converse(client, f"{self._number}-{conversation}")
                except AllMade:
                    return

    def _converse(self, client: httpx.Client, name: str) -> None:
        thinks = " It thinks." if self._luck.random() < 0.4 else ""
        headers = {"x-session-id": name} if self._luck.random() < 0.5 else {}
        headers["lambda"] = self._luck.choice(("0", "0.05", "0.1", "0.3"))
        messages: list[Json] = [{"role": "user", "content": f"Mend the parser of project {name}, please.{thinks}"}]
        models: list[str] = []
        for _ in range(3):
            while True:
                message, model = self._answer(client, messages, headers)
                messages.append(message)
                models.append(model)
                if not message.get("tool_calls"):
                    break
                result = self._luck.choice(RESULTS)
                messages += [
                    {"role": "tool", "tool_call_id": call["id"], "content": result} for call in message["tool_calls"]
                ]
            messages.append({"role": "user", "content": "It still fails. Please go on."})
        with self._tally.lock:
            self._tally.models.add(tuple(models))

    def _answer(self, client: httpx.Client, messages: list[Json], headers: dict[str, str]) -> tuple[Json, str]:
        for _ in range(MAX_TRIES):
            if not self._tally.take():
                raise AllMade
            body: Json = {"model": "auto", "messages": messages, "tools": TOOLS, "stream": self._luck.random() < 0.5}
            reply = client.post(self._url, json=body, headers=headers)
            message: Any = None
            if reply.status_code == 200:
                message = assembled(reply.text) if body["stream"] else reply.json()["choices"][0]["message"]
            with self._tally.lock:
                self._tally.statuses[reply.status_code] += 1
                self._tally.reasons[reply.headers.get("x-uniroute-reason", "")] += 1
                self._tally.broken += reply.status_code == 200 and message is None
            if message is not None:
                return message, reply.headers["x-uniroute-model"]
            time.sleep(RETRY_S)
        raise AssertionError("no model has answered")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("requests", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_result_and_no_signature_reaches_a_model_that_did_not_make_it(fleet: Fleet, requests: int) -> None:
    tally = Tally(requests)
    with ThreadPoolExecutor(CLIENTS) as pool:
        for done in [pool.submit(Agent(fleet, tally, number).run) for number in range(CLIENTS)]:
            done.result()

    assert {name: upstream.breaks for name, upstream in fleet.upstreams.items()} == {name: [] for name in MODELS}
    assert sum(tally.statuses.values()) == requests
    # All of this has happened on the way.
    assert {200, 500, 503} <= set(tally.statuses)
    assert {"scored", "sticky", "fallback"} <= set(tally.reasons)
    assert tally.broken > 0
    assert " rests for " in fleet.proxy.log
    assert any(len(set(models)) > 1 for models in tally.models)
    assert "uniroute_conversations_moved_total 0.0" in httpx.get(f"{fleet.proxy.url}/metrics", timeout=60).text
