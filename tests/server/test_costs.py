from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from proxy.storage.usage_writer import STREAM
from proxy.storage.valkey import EmbeddedValkey
from tests.support.proxy_process import NO_COOLDOWN, ProxyProcess, model_entry
from tests.support.scripted_answers import Step
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.usage_reports import CASES, COSTS, PARTIAL_REPORTS, PRICES, REPORTS, picodollars
from tests.support.waiting import wait_until

MODES = ("relay", "translate")
SHAPES = ("whole", "at the end", "in the choice", "in x_groq")
PIECE = "x" * 40
# What an upstream says until the client leaves.
WAITING = [b": more is coming\n\n"] * 1000


@dataclass(frozen=True)
class PricedProxy:
    """Serve a model for each price and mode, and read the usage record of each request."""

    proxy: ProxyProcess
    upstream: ScriptedUpstream
    store: redis.Redis

    records: dict[str, dict[str, Any]]
    """By decision, as far as they were read."""

    def ask(self, model: str, step: Step, *, stream: bool, leave_after: int | None = None) -> str:
        """Send one request and return its decision; disconnect after `leave_after` pieces."""
        self.upstream.then(step)
        body = {"model": model, "stream": stream, "messages": [{"role": "user", "content": "hi"}]}
        seen = 0
        with (
            suppress(httpx.RemoteProtocolError),
            httpx.stream("POST", f"{self.proxy.url}/v1/chat/completions", json=body, timeout=60) as response,
        ):
            decision = response.headers["x-uniroute-decision"]
            for line in response.iter_lines():
                seen += PIECE in line
                if seen == leave_after:
                    break
        return decision

    def record(self, decision: str) -> dict[str, Any]:
        """Return its usage record, which is written within half a second."""
        assert wait_until(lambda: decision in self.records or decision in self._read())
        return self.records[decision]

    def _read(self) -> dict[str, dict[str, Any]]:
        stored: Any = self.store.xrange(STREAM, "-", "+")
        entries = [json.loads(fields[b"record"]) for _, fields in stored]
        self.records.update({entry["decision"]: entry for entry in entries})
        return self.records


@pytest.fixture(scope="module")
def priced(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[PricedProxy]:
    folder = tmp_path_factory.mktemp("priced")
    with ScriptedUpstream() as upstream:
        models = [
            {**model_entry(f"{price}-{mode}", upstream.url), "model_info": {**rates, "forward": mode}}
            for price, rates in PRICES.items()
            for mode in MODES
        ]
        config = {"model_list": models, "uniroute": {"profile": {"on_start": False}, "breaker": NO_COOLDOWN}}
        with (
            ProxyProcess(folder, embedder_cache, config, {"MODEL_API_KEY": "sk-x"}) as proxy,
            redis.Redis(unix_socket_path=str(EmbeddedValkey(folder).socket_path)) as store,
        ):
            yield PricedProxy(proxy, upstream, store, {})


def chunk(delta: dict[str, Any], finish: str | None = None, usage: Any = None, **choice: Any) -> dict[str, Any]:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish, **choice}]
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices} | (
        {} if usage is None else {"usage": usage}
    )


def answered(shape: str, usage: dict[str, Any]) -> Step:
    """Build a complete response that reports its usage in this place."""
    if shape == "whole":
        message = {"role": "assistant", "content": PIECE}
        return Step(body={"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage})
    start, stop = chunk({"role": "assistant", "content": PIECE}), chunk({}, "stop")
    last = {
        "at the end": [stop, {**stop, "choices": [], "usage": usage}],
        "in the choice": [chunk({}, "stop", usage=usage)],
        "in x_groq": [{**stop, "x_groq": {"id": "req", "usage": usage}}],
    }
    return Step(events=[start, *last[shape]])


# Each report at the prices that have something to say of it.
PAID = [(use, vendor, price) for use, vendor in CASES for price in COSTS[use]]


def _broken(priced: PricedProxy, model: str, events: list[Any]) -> str:
    return priced.ask(model, Step(events=[*events, WAITING[0]], cut_after=len(events)), stream=True)


def _left(priced: PricedProxy, model: str, events: list[Any]) -> str:
    return priced.ask(model, Step(events=[*events, *WAITING], drip_s=0.01), stream=True, leave_after=len(events))


UNENDED = {"broken": _broken, "client_gone": _left}


@pytest.fixture(scope="module")
def decisions(priced: PricedProxy) -> dict[tuple[str, ...], str]:
    """Return the decision of every request of the matrix. They run together: each record takes half a second."""
    found: dict[tuple[str, ...], str] = {}
    for (use, vendor, price), mode, shape in product(PAID, MODES, SHAPES[:2]):
        step = answered(shape, REPORTS[use][vendor])
        found[use, vendor, price, mode, shape] = priced.ask(f"{price}-{mode}", step, stream=shape != "whole")
    for usage_so_far, mode, (ending, ask) in product(PARTIAL_REPORTS, MODES, UNENDED.items()):
        events = [chunk({"content": PIECE}, usage=usage) for usage in PARTIAL_REPORTS[usage_so_far][0]]
        found[usage_so_far, mode, ending] = ask(priced, f"flat-{mode}", events)
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("use", "vendor", "price"), PAID)
def test_a_complete_response_costs_what_its_reported_usage_says(
    priced: PricedProxy, decisions: dict[tuple[str, ...], str], use: str, vendor: str, price: str, mode: str
) -> None:
    records = [priced.record(decisions[use, vendor, price, mode, shape]) for shape in SHAPES[:2]]
    assert [record["cost_picousd"] for record in records] == [picodollars(use, price)] * 2
    assert [record["ending"] for record in records] == ["complete"] * 2


@pytest.mark.parametrize("shape", SHAPES[2:])
@pytest.mark.parametrize("mode", MODES)
def test_usage_is_found_in_other_places_of_a_stream(priced: PricedProxy, shape: str, mode: str) -> None:
    step = answered(shape, REPORTS["800 cached"]["moonshot"])
    record = priced.record(priced.ask(f"cached-{mode}", step, stream=True))
    assert (record["cost_picousd"], record["cached_tokens"]) == (picodollars("800 cached", "cached"), 800)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ending", UNENDED)
@pytest.mark.parametrize("usage_so_far", PARTIAL_REPORTS)
def test_an_unfinished_response_costs_what_was_received(
    priced: PricedProxy, decisions: dict[tuple[str, ...], str], usage_so_far: str, ending: str, mode: str
) -> None:
    record = priced.record(decisions[usage_so_far, mode, ending])
    assert (record["ending"], record["cost_picousd"]) == (ending, PARTIAL_REPORTS[usage_so_far][1])


@pytest.mark.parametrize("mode", MODES)
def test_reasoning_of_an_unfinished_response_is_charged_too(priced: PricedProxy, mode: str) -> None:
    events = [chunk({"reasoning_content": PIECE}), chunk({"reasoning_content": PIECE}), chunk({"content": PIECE})]
    assert priced.record(_broken(priced, f"flat-{mode}", events))["cost_picousd"] == 304_000_000


@pytest.mark.parametrize("mode", MODES)
def test_a_discarded_response_is_charged(priced: PricedProxy, mode: str) -> None:
    """It has no choices to pass on, and reports its usage."""
    thrown_away = Step(body={"id": "x", "usage": REPORTS["900 written"]["anthropic"]})
    record = priced.record(priced.ask(f"written-{mode}", thrown_away, stream=False))
    assert (record["ending"], record["cost_picousd"]) == ("failed", picodollars("900 written", "written"))


def test_usage_of_every_kind_is_in_the_record_and_the_metrics(priced: PricedProxy) -> None:
    priced.ask("written-relay", answered("whole", REPORTS["900 written"]["litellm"]), stream=False)
    sound = priced.ask("audio-relay", answered("whole", REPORTS["900 and 90 audio"]["openai"]), stream=False)
    record = priced.record(sound)
    assert [record[f"{kind}_tokens"] for kind in ("audio_input", "audio_output", "cache_write")] == [900, 90, None]
    metrics = priced.proxy.admin("GET", "/metrics").text
    assert 'uniroute_tokens_total{kind="cache_write",model="written-relay"}' in metrics
    totals: Any = priced.store.hgetall("uniroute:usage:totals:written-relay")
    assert int(totals[b"cache_write_tokens"]) >= 900
