"""Replay generated runs of agents, with and without the term for trajectories: `python -m tests.bench.trajectories`.

Three models of different skill are behind scripted upstreams, and a real server for each weight routes between them. An
agent has a task of some steps. In each turn the model tries one of them by a tool call; the result says whether that
went well. A model that fails too often in a row, or has tried often enough, hands back to the user, who asks it to go
on, until the task is solved or the user has asked often enough. Only then can another model take over.

What the failures of a run say of its model is not known, so that there are several worlds. In each the models solve as
much on average, and their profiles have exactly what they solve of a first turn:

    model   a model can do a task or cannot, whatever the others can
    task    a task is hard or easy for all models, beside what they can on average
    both    half of each
    null    all attempts of a model succeed with the same probability: failures say nothing
    noise   as null, and a quarter of the results look like failures that are none

All weights see the same tasks, and the same luck of each model in each of them. Intervals are 95 %: Wilson's for
shares, and of 2,000 bootstrap draws of whole runs for differences. With `--sweep` the same code routes in this process,
without HTTP, for all worlds, several λ, seeds and weights. With `--cost` it says what the term costs a request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import tempfile
import time
import timeit
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
import numpy as np

from proxy.routing.affinity import NO_AFFINITY, AffinityRecorder, load_affinity
from proxy.routing.assigner import ClusterAssigner
from proxy.routing.chat_request import ChatRequest, read_chat
from proxy.routing.selection import select_model
from proxy.routing.selection_context import SelectionContext
from proxy.settings.schema import Settings
from proxy.storage.records import StoredProfile
from proxy.storage.redis import Store
from proxy.storage.sessions import SessionStore
from proxy.storage.snapshot import RoutingSnapshot, build_state
from proxy.storage.state_reader import StoredState
from tests.conftest import CACHE
from tests.support.makers import CORNERS, a_profile, a_record, snapshot_inputs
from tests.support.proxy_process import ProxyProcess, model_entry, uniform_profile
from tests.support.scripted_answers import Step
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.selections import Corners

Json = dict[str, Any]

RUNS = 200

# Probability that an attempt succeeds, on average, and USD per input token; an output token costs four times that.
MODELS = {"small": (0.45, 1.5e-7), "medium": (0.6, 8e-7), "large": (0.8, 4e-6)}
CACHED_SHARE = 0.1

STEPS, MAX_USER_TURNS, MAX_ATTEMPTS, GIVES_UP_AFTER = 5, 3, 6, 3

OUTPUT_TOKENS = 200

# The spread of a task's difficulty, as a logit, and which part of it is shared by all models.
SPREAD = 2.0
WORLDS = {"model": 0.0, "task": 1.0, "both": 0.5, "null": None, "noise": None}
NOISE = 0.25

WEIGHTS = (0.0, 0.5, 0.75, 1.0)
# The next to last is a hair above the λ at which another model is chosen first in two of the worlds.
LAMBDAS = (0.1, 0.3, 0.35, 1.0)

SYSTEM = "You are a coding agent. Use the tools that you are given, and say when you are done. " * 40
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("bash", "edit")
]
TASK = (
    "The parser drops the last field of a line that ends with a comma. Please find out why, mend it and run the tests."
)
GO_ON = "That does not work yet. Please go on."

WELL = (
    "src/errors.py\nsrc/parser.py\ntests/test_parser.py\n",
    "===== 31 passed in 0.82s =====",
    "The file src/parser.py has been updated.",
    "Process exited with code 0\nOutput:\n0 errors, 2 warnings\n",
)
BADLY = (
    "Exit code 1\nFAILED tests/test_parser.py::test_last_field\n===== 1 failed, 30 passed in 0.81s =====",
    "<tool_use_error>String to replace not found in file.</tool_use_error>",
    "Process exited with code 2\nOutput:\nerror: unrecognised arguments\n",
    'Traceback (most recent call last):\n  File "src/parser.py", line 8\nValueError: too many values to unpack',
)


def logistic(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))


@dataclass(frozen=True)
class World:
    name: str
    seed: int

    def chance(self, run: int, model: str) -> float:
        """Return the probability that an attempt of this model succeeds in this run."""
        skill, shared = MODELS[model][0], WORLDS[self.name]
        if shared is None:
            return skill
        own = Random(f"{self.seed}/{run}/{model}").gauss(0, 1)
        ours = Random(f"{self.seed}/{run}").gauss(0, 1)
        spread = SPREAD * (math.sqrt(1 - shared) * own + math.sqrt(shared) * ours)
        return logistic(CENTRES[model] + spread)

    def luck(self, run: int, model: str) -> Random:
        return Random(f"luck {self.seed}/{run}/{model}")

    def first_turn_error(self, model: str, runs: int = 4000) -> float:
        """Return the share of first turns in which this model does not solve the task."""
        failed = 0
        for run in range(10**6, 10**6 + runs):
            luck, chance = self.luck(run, model), self.chance(run, model)
            failed += attempts_of_turn(luck, chance, STEPS)[1] > 0
        return failed / runs


def centre(mean: float) -> float:
    """Return the logit around which a spread of SPREAD gives this mean."""
    draws = SPREAD * np.random.default_rng(0).normal(size=20_000)
    low, high = -10.0, 10.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        found = float((1.0 / (1.0 + np.exp(-(middle + draws)))).mean())
        low, high = (middle, high) if found < mean else (low, middle)
    return low


CENTRES = {name: centre(skill) for name, (skill, _) in MODELS.items()}


def attempts_of_turn(luck: Random, chance: float, left: int) -> tuple[int, int]:
    """Return the attempts that a model makes in one turn of its user, and the steps that are left then."""
    in_a_row = 0
    for attempt in range(1, MAX_ATTEMPTS + 1):
        if luck.random() < chance:
            left, in_a_row = left - 1, 0
        else:
            in_a_row += 1
        if not left or in_a_row == GIVES_UP_AFTER:
            return attempt, left
    return MAX_ATTEMPTS, left


@dataclass
class Outcome:
    solved: bool = False
    usd: float = 0.0
    requests: int = 0
    switches: int = 0
    breaks: int = 0
    """Requests with a tool's result that reached a model which had not made the call."""
    models: list[str] = field(default_factory=list)
    """Of each turn of the user."""


# The body of a request, its headers, and what each model would answer → the model that did.
Ask = Callable[[Json, Mapping[str, str], Mapping[str, Json]], Awaitable[str]]


class Run:
    """One agent with one task. It keeps the conversation, and what each model can do."""

    def __init__(self, world: World, number: int) -> None:
        self._world = world
        self._number = number
        self._messages: list[Json] = [{"role": "system", "content": SYSTEM}]
        self._luck = {model: world.luck(number, model) for model in MODELS}
        self._chances = {model: world.chance(number, model) for model in MODELS}
        self._noise = Random(f"noise {world.seed}/{number}")
        self._ids = Random(f"ids {world.seed}/{number}")
        self._cached: tuple[str, int] = ("", 0)
        self.outcome = Outcome()

    async def play(self, ask: Ask) -> Outcome:
        outcome, left = self.outcome, STEPS
        for user_turn in range(MAX_USER_TURNS):
            self._messages.append({"role": "user", "content": GO_ON if user_turn else TASK})
            model, in_a_row, attempts = await self._answer(ask, maker=None), 0, 0
            outcome.models.append(model)
            while left and in_a_row < GIVES_UP_AFTER and attempts < MAX_ATTEMPTS:
                attempts += 1
                well = self._luck[model].random() < self._chances[model]
                left, in_a_row = (left - 1, 0) if well else (left, in_a_row + 1)
                is_last = not left or in_a_row == GIVES_UP_AFTER or attempts == MAX_ATTEMPTS
                self._result(well=well)
                reached = await self._answer(ask, maker=model, says="I have done what I could." if is_last else None)
                outcome.breaks += reached != model
            if not left:
                outcome.solved = True
                break
        outcome.switches = sum(a != b for a, b in zip(outcome.models, outcome.models[1:], strict=False))
        return outcome

    def _result(self, *, well: bool) -> None:
        noisy = self._world.name == "noise" and self._noise.random() < NOISE
        text = self._noise.choice(WELL if well and not noisy else BADLY)
        call_id = self._messages[-1]["tool_calls"][0]["id"]
        self._messages.append({"role": "tool", "tool_call_id": call_id, "content": text})

    async def _answer(self, ask: Ask, *, maker: str | None, says: str | None = None) -> str:
        """Ask for the next turn of the model: its words, or else a tool call."""
        prompt = json.dumps(self._messages)
        tokens = len(prompt) // 4
        message: Json = {"role": "assistant", "content": says or ""}
        if says is None:
            call_id = f"call_{self._ids.getrandbits(96):024x}"
            arguments = json.dumps({"command": f"pytest -q -k {self._ids.randrange(1000)}"})
            call = {"id": call_id, "type": "function", "function": {"name": "bash", "arguments": arguments}}
            message["tool_calls"] = [call]
        usage = {"prompt_tokens": tokens, "completion_tokens": OUTPUT_TOKENS, "total_tokens": tokens + OUTPUT_TOKENS}
        answer = {"message": message, "usage": usage}
        body: Json = {"model": "auto", "messages": list(self._messages), "tools": TOOLS}
        session = {"x-session-id": f"{self._world.name}-{self._world.seed}-{self._number}"}
        model = await ask(body, session, dict.fromkeys(MODELS, answer))
        price = MODELS[model][1]
        cached = min(self._cached[1], tokens) if self._cached[0] == model else 0
        self.outcome.usd += price * (tokens - cached + CACHED_SHARE * cached + 4 * OUTPUT_TOKENS)
        self.outcome.requests += 1
        self._cached = (model, tokens + OUTPUT_TOKENS)
        self._messages.append(message)
        return model


def settings_of(weight: float) -> Json:
    return {"trajectory": "auto", "trajectory_weight": weight} if weight else {"trajectory": "off"}


def in_process(world: World, weight: float, lambda_: float, folder: Path) -> Ask:
    """Route as the server does, without HTTP and without Redis."""
    settings = Settings.model_validate({"data_dir": folder, "lambda": lambda_, **settings_of(weight)})
    sessions = SessionStore(Store(f"unix://{folder}/nothing.sock"), 3600)
    snapshot, assigner = a_snapshot(world), ClusterAssigner(Corners(), 10.0)

    async def ask(body: Json, headers: Mapping[str, str], answers: Mapping[str, Json]) -> str:
        request = read_chat(body, list(headers.items()))
        affinity = await load_affinity(sessions, request, None, settings)
        ctx = SelectionContext("dec-1", request, None, snapshot, settings, affinity=affinity)
        model = (await select_model(ctx, assigner)).model
        recorder = AffinityRecorder(sessions, affinity, request.body["messages"])
        answer = answers[model]
        recorder.observe_completion({"choices": [{"message": answer["message"], "finish_reason": "stop"}]}, model)
        recorder.commit(model, answer["usage"]["total_tokens"])
        return model

    return ask


def a_snapshot(world: World) -> RoutingSnapshot:
    records = {
        name: a_record(
            name,
            info={
                "input_cost_per_token": price,
                "output_cost_per_token": 4 * price,
                "cache_read_input_token_cost": CACHED_SHARE * price,
                "supports_function_calling": True,
            },
        )
        for name, (_, price) in MODELS.items()
    }
    profiles = {
        name: StoredProfile(record.fingerprint, a_profile([world.first_turn_error(name)] * CORNERS.size))
        for name, record in records.items()
    }
    stored = StoredState(version=1, models=records, profiles=profiles, keys_exist=False)
    return build_state(stored, snapshot_inputs(), keys_latched=False)


class Servers:
    """A server for each weight, before the same three upstreams."""

    def __init__(self, folder: Path, weights: Sequence[float], lambda_: float) -> None:
        self._closing = ExitStack()
        self.upstreams = {name: self._closing.enter_context(ScriptedUpstream()) for name in MODELS}
        self.proxies: dict[float, ProxyProcess] = {}
        for weight in weights:
            config = {
                "model_list": [
                    model_entry(
                        name,
                        self.upstreams[name].url,
                        price=price,
                        cache_read_input_token_cost=CACHED_SHARE * price,
                        supports_function_calling=True,
                    )
                    for name, (_, price) in MODELS.items()
                ],
                "uniroute": {"profile": {"on_start": False}, "lambda": lambda_, **settings_of(weight)},
            }
            proxy = ProxyProcess(folder / f"weight-{weight}", CACHE, config, {"MODEL_API_KEY": "sk-x"})
            self.proxies[weight] = self._closing.enter_context(proxy)

    def close(self) -> None:
        self._closing.close()

    def measure(self, world: World) -> None:
        """Store what the models solve in this world as their profiles."""
        for name in MODELS:
            document = uniform_profile(world.first_turn_error(name), output_tokens=OUTPUT_TOKENS)
            for proxy in self.proxies.values():
                proxy.admin("POST", f"/admin/models/{name}/profile", document).raise_for_status()

    def asking(self, weight: float, client: httpx.AsyncClient) -> Ask:
        async def ask(body: Json, headers: Mapping[str, str], answers: Mapping[str, Json]) -> str:
            for name, answer in answers.items():
                called = "tool_calls" in answer["message"]
                self.upstreams[name].always = Step(**answer, finish_reason="tool_calls" if called else "stop")
                self.upstreams[name].history.clear()
            url = f"{self.proxies[weight].url}/v1/chat/completions"
            reply = (await client.post(url, json=body, headers=dict(headers))).raise_for_status()
            reached = [name for name, upstream in self.upstreams.items() if upstream.history]
            assert reached == [reply.headers["x-uniroute-model"]]
            return reached[0]

        return ask


async def replay(world: World, ask: Ask, runs: int) -> list[Outcome]:
    return [await Run(world, number).play(ask) for number in range(runs)]


def wilson(part: int, whole: int, z: float = 1.96) -> tuple[float, float]:
    share = part / whole
    middle = (share + z * z / (2 * whole)) / (1 + z * z / whole)
    half = z * math.sqrt(share * (1 - share) / whole + z * z / (4 * whole * whole)) / (1 + z * z / whole)
    return middle - half, middle + half


def bootstrap(differences: Sequence[float], seed: int = 0) -> tuple[float, float]:
    values = np.array(differences)
    draws = np.random.default_rng(seed).integers(len(values), size=(2000, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def lines(found: Mapping[float, Sequence[Outcome]]) -> Iterator[str]:
    """Yield a row for each weight: what was solved, what it cost, and the difference to no term, run by run."""
    without = found[0.0]
    titles = f"{'solved (95 %)':20}  {'Δ solved (95 %)':23}  $/1000 runs  {'Δ cost (95 %)':23}"
    yield f"weight  {titles}  switches  breaks"
    for weight, outcomes in found.items():
        solved = sum(each.solved for each in outcomes)
        low, high = wilson(solved, len(outcomes))
        usd = 1000 * sum(each.usd for each in outcomes) / len(outcomes)
        before = 1000 * sum(each.usd for each in without) / len(without)
        more = [float(a.solved) - float(b.solved) for a, b in zip(outcomes, without, strict=True)]
        dearer = [1000 * (a.usd - b.usd) / before for a, b in zip(outcomes, without, strict=True)]
        (more_low, more_high), (cost_low, cost_high) = bootstrap(more), bootstrap(dearer)
        switches = sum(each.switches for each in outcomes) / len(outcomes)
        yield (
            f"{weight:6.2f}  {solved / len(outcomes):.3f} ({low:.3f}, {high:.3f})"
            f"  {sum(more) / len(more):+.3f} ({more_low:+.3f}, {more_high:+.3f})"
            f"  {usd:11.2f}  {sum(dearer) / len(dearer):+.3f} ({cost_low:+.3f}, {cost_high:+.3f})"
            f"  {switches:8.2f}  {sum(each.breaks for each in outcomes):6d}"
        )


async def against_servers(
    worlds: Sequence[World], weights: Sequence[float], lambda_: float, runs: int
) -> AsyncIterator[str]:
    with tempfile.TemporaryDirectory(prefix="uniroute-trajectories-") as folder:
        servers = Servers(Path(folder), weights, lambda_)
        try:
            async with httpx.AsyncClient(timeout=60) as client:
                for world in worlds:
                    servers.measure(world)
                    found = {each: await replay(world, servers.asking(each, client), runs) for each in weights}
                    yield f"\n{world.name}, seed {world.seed}, λ = {lambda_}, {runs} runs"
                    for line in lines(found):
                        yield line
        finally:
            servers.close()


async def sweep(names: Sequence[str], lambdas: Sequence[float], seeds: Sequence[int], runs: int) -> AsyncIterator[str]:
    logging.disable(logging.WARNING)  # that there is no Redis
    with tempfile.TemporaryDirectory(prefix="uniroute-trajectories-") as folder:
        for name in names:
            for lambda_ in lambdas:
                found: dict[float, list[Outcome]] = defaultdict(list)
                for seed in seeds:
                    world = World(name, seed)
                    for weight in WEIGHTS:
                        found[weight] += await replay(world, in_process(world, weight, lambda_, Path(folder)), runs)
                yield f"\n{name}, {len(seeds)} seeds, λ = {lambda_}, {runs} runs each"
                for line in lines(found):
                    yield line


def best_us(measured: Callable[[], object]) -> float:
    """Return the µs of CPU that a call takes, in the best of many tries."""
    tries = timeit.repeat(measured, number=20, repeat=300, timer=time.thread_time)
    return min(tries) / 20 * 1e6


def cost() -> Iterator[str]:
    """Yield what the term costs a request, in µs of CPU: reading, and finding out whose turns they were."""
    sessions = SessionStore(Store("unix:///nothing.sock"), 3600)
    off, auto = (Settings.model_validate(settings_of(weight)) for weight in (0.0, 0.75))
    yield "messages of a request                off     auto     µs of CPU until it is known whose conversation it is"
    for name, turns, results in (
        ("a question without tools", 0, WELL),
        ("60 turns that went well", 60, WELL),
        ("60 turns that failed", 60, BADLY),
    ):
        messages: list[Json] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": TASK}]
        for number in range(turns):
            call_id = f"call_9pw1qnYScq{number}"
            arguments = json.dumps({"command": f"pytest -q -k {number}"})
            call = {"id": call_id, "type": "function", "function": {"name": "bash", "arguments": arguments}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            text = results[number % len(results)] + "\nand more" * 200 * (number % 2)
            messages.append({"role": "tool", "tool_call_id": call_id, "content": text})
            AffinityRecorder(sessions, NO_AFFINITY, messages).observe_completion(
                {"choices": [{"message": messages[-2], "finish_reason": "tool_calls"}]}, "small"
            )
        if turns:
            messages += [{"role": "assistant", "content": "I have done what I could."}, messages[1]]
        request = read_chat({"model": "auto", "messages": messages, **({"tools": TOOLS} if turns else {})}, [])

        def measured(settings: Settings, request: ChatRequest = request) -> float:
            return best_us(lambda: finished(load_affinity(sessions, request, None, settings)))

        yield f"{name:32}  {measured(off):6.1f}   {measured(auto):6.1f}"


def finished(work: Coroutine[Any, Any, object]) -> object:
    """Run what never has to wait."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits")


async def show(found: AsyncIterator[str]) -> None:
    async for line in found:
        print(line, flush=True)  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--seed", type=int, default=1, help="with --sweep, how many seeds")
    parser.add_argument("--lambdas", type=float, nargs="+", default=LAMBDAS)
    parser.add_argument("--weights", type=float, nargs="+", default=(0.0, 0.75))
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=list(WORLDS))
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--cost", action="store_true", help="what the term costs a request, and nothing else")
    chosen = parser.parse_args()
    if chosen.cost:
        print(*cost(), sep="\n")  # noqa: T201
    elif chosen.sweep:
        asyncio.run(show(sweep(chosen.worlds, chosen.lambdas, range(1, chosen.seed + 1), chosen.runs)))
    else:
        worlds = [World(name, chosen.seed) for name in chosen.worlds]
        for lambda_ in chosen.lambdas:
            asyncio.run(show(against_servers(worlds, chosen.weights, lambda_, chosen.runs)))


if __name__ == "__main__":
    main()
