"""Simulate a day of traffic on which a model silently becomes worse at noon: `python -m tests.bench.day`.

A real server, whose clock is that of the day (libfaketime, extra `clock`), measures three models by its own jobs and
routes requests that come in waves, from 40 client keys. A sample of the answers is given feedback some minutes later.
Every ten minutes of the day the models are looked at, as the page does. It prints when observed and measured part, and
after how many labels; what a test of all labels would have said; and what the report says beside the truth, which is
known here: what each answer was, and what the upstream's own ledger has. With --drop 0 nothing happens at noon, and
every model that is flagged is a false alarm.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import httpx

from proxy.storage.feedback import MAX_P, two_proportion_p
from router_core.pricing import PICO
from router_core.validation.validation_set import ValidationPrompt
from tests.acceptance.kinds import Library
from tests.bench.day_models import MODELS, WORSE
from tests.bench.lean_client import LeanClient
from tests.conftest import CACHE
from tests.dashboard.site import Site
from tests.support.command import environment, run_command
from tests.support.program import ROOT
from tests.support.proxy_process import ADMIN_KEY, ProxyProcess, model_entry
from tests.support.waiting import until, wait_until

MINUTES, NOON = 24 * 60, 12 * 60

KEYS, CONNECTIONS, CRITICS = 40, 12, 8

LOOK_EVERY, FEEDBACK_AFTER = 10, 20

MAX_TRIES, RETRY_S = 20, 0.25

PROMPTS = 200


@dataclass(frozen=True)
class Plan:
    requests: int = 20_000
    feedback: float = 0.05
    """The share of the answers that is given feedback."""
    drop: float = 0.3
    """By how much more often the model is wrong from noon on."""
    seed: int = 0


@dataclass
class Answer:
    minute: int
    model: str
    right: bool
    expected_error: float | None
    usd: float
    graded: bool = False


@dataclass
class Look:
    minute: int
    flagged: dict[str, dict[str, Any]]
    """Model → what was observed of it."""


@dataclass
class Day:
    plan: Plan
    answers: list[Answer] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Model → its mean error, and the labels behind it."""
    ledger_picousd: int = 0
    """Of the answers, without what measuring cost."""
    profiling_picousd: int = 0
    page: str = ""
    """The view of quality when a model was first flagged."""
    seconds: float = 0.0

    def first_flag(self, model: str = WORSE) -> Look | None:
        return next((look for look in self.looks if model in look.flagged), None)

    def false_alarms(self) -> list[tuple[int, str]]:
        """Return where a model began to be flagged that had not become worse, or not yet."""
        found, before = [], set[str]()
        for look in self.looks:
            wrong = {name for name in look.flagged if name != WORSE or look.minute < NOON or not self.plan.drop}
            found += [(look.minute, name) for name in sorted(wrong - before)]
            before = wrong
        return found

    def labels(self, start: int, end: int, model: str = WORSE) -> list[Answer]:
        return [each for each in self.answers if each.graded and each.model == model and start <= each.minute < end]

    def all_labels_test(self, measured: float, measured_labels: float) -> int | None:
        """Return the minute at which a test of all labels against the measured rate has p < MAX_P."""
        for minute in range(0, MINUTES + 1, LOOK_EVERY):
            seen = self.labels(0, minute)
            if len(seen) < 20:
                continue
            rate = sum(not each.right for each in seen) / len(seen)
            if two_proportion_p(rate, len(seen), measured, measured_labels) < MAX_P:
                return minute
        return None


class Clock:
    """The clock of the server and its store, as libfaketime reads it from a file."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "clock"
        self.midnight = (math.ceil(time.time() / 86_400) + 1) * 86_400
        self.set(-90)

    def set(self, minute: float) -> None:
        """Let it be so many minutes after midnight."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"+{self.midnight + 60 * minute - time.time():.3f}")
        fresh.replace(self._file)

    @property
    def environ(self) -> dict[str, str]:
        spec = find_spec("libfaketime")
        assert spec is not None, "the clock needs the extra `clock`"
        assert spec.submodule_search_locations is not None
        (library,) = Path(spec.submodule_search_locations[0]).rglob("libfaketime.so.1")
        return {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",
        }


def requests_of(plan: Plan) -> list[int]:
    """Return how many requests each minute has: two waves, most in the afternoon, hardly any at night."""
    waves = [1.0 + 0.7 * math.sin(2 * math.pi * (minute - 540) / MINUTES) for minute in range(MINUTES)]
    waves = [wave * (1.0 + 0.3 * math.sin(2 * math.pi * minute / 180)) for minute, wave in enumerate(waves)]
    total, found, owed = sum(waves), [], 0.0
    for wave in waves:
        owed += plan.requests * wave / total
        found.append(int(owed))
        owed -= int(owed)
    return found


@contextmanager
def models(folder: Path, plan: Plan) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    command = [sys.executable, "-m", "tests.bench.day_models", "--port", str(port), "--worse", str(folder / "worse")]
    process = subprocess.Popen([*command, "--drop", str(plan.drop), "--seed", str(plan.seed)], cwd=ROOT)
    try:
        assert wait_until(lambda: _ledger(port) is not None)
        yield port
    finally:
        process.terminate()
        process.wait(30)


def _ledger(port: int) -> dict[str, int] | None:
    try:
        found: dict[str, int] = httpx.get(f"http://127.0.0.1:{port}/ledger", timeout=5).json()
    except httpx.HTTPError:
        return None
    return found


def simulate(folder: Path, plan: Plan) -> Day:
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    clock = Clock(folder)
    with models(folder, plan) as port:
        config = {
            "model_list": [_entry(name, port) for name in MODELS],
            "uniroute": {
                "profile": {"prompts": PROMPTS},
                # the records of a whole day, at the pace of the simulation
                "max_decisions_per_s": 10_000,
                "max_decisions": 100_000,
                "max_decision_bytes": 10**9,
            },
        }
        environ = {"MODEL_API_KEY": "sk-x", **clock.environ}
        with ProxyProcess(folder, CACHE, config, environ) as proxy:
            assert wait_until(lambda: all(_card(proxy, name)["state"] == "ready" for name in MODELS)), proxy.log
            measuring = sum((_ledger(port) or {}).values())
            profiles = {name: _card(proxy, name)["profile"] for name in MODELS}
            day = asyncio.run(Driver(plan, proxy, clock, folder / "worse").run())
            day.measured = {name: (each["mean_error"], sum(each["labels"])) for name, each in profiles.items()}
            day.profiling_picousd = measuring
            day.ledger_picousd = sum((_ledger(port) or {}).values()) - measuring
            day.report = _report(proxy, plan.requests)
    day.seconds = time.monotonic() - began
    return day


def _entry(name: str, port: int) -> dict[str, Any]:
    read, written, _ = MODELS[name]
    prices = {"input_cost_per_token": read / PICO, "output_cost_per_token": written / PICO}
    found = model_entry(name, f"http://127.0.0.1:{port}/v1")
    return {**found, "model_info": prices}


def _card(proxy: ProxyProcess, name: str) -> dict[str, Any]:
    found: dict[str, Any] = proxy.admin("GET", f"/admin/models/{name}").json()
    return found


def _report(proxy: ProxyProcess, requests: int) -> dict[str, Any]:
    environ = environment(proxy.folder / "cli", UNIROUTE_URL=proxy.url, UNIROUTE_ADMIN_KEY=ADMIN_KEY)
    found: list[dict[str, Any]] = []

    def is_whole() -> bool:
        done = run_command("report", "--json", environ=environ)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
        return bool(found[-1]["total"]["requests"] == requests)

    assert wait_until(is_whole), found[-1]["total"]
    return found[-1]


class Driver:
    """Send the requests and the feedback of the day, minute by minute."""

    def __init__(self, plan: Plan, proxy: ProxyProcess, clock: Clock, worse: Path) -> None:
        self._proxy = proxy
        self._clock = clock
        self._worse = worse
        self._now = 0
        self._giving = 0
        self._rng = Random(plan.seed)
        self._prompts = Library.open().held_back
        self._day = Day(plan)
        self._said: list[tuple[int, str, float, str]] = []
        """Minute, decision, score and key of feedback that is to be given."""
        made = [proxy.admin("POST", "/admin/keys", {"name": f"user {n}"}) for n in range(KEYS)]
        self._keys = [str(reply.json()["key"]) for reply in made]
        port = int(proxy.url.rpartition(":")[2])
        self._clients: asyncio.Queue[LeanClient] = asyncio.Queue()
        for _ in range(CONNECTIONS):
            self._clients.put_nowait(LeanClient(port))
        # Feedback on a decision that is on its way to the store waits for it.
        self._critics = [LeanClient(port) for _ in range(CRITICS)]
        self._graded: dict[tuple[str, str], bool] = {}

    async def run(self) -> Day:
        async with asyncio.TaskGroup() as tasks:
            critics = [tasks.create_task(self._criticise(client)) for client in self._critics]
            for minute, count in enumerate(requests_of(self._day.plan)):
                self._clock.set(minute)
                self._now = minute
                if minute == NOON and self._day.plan.drop:
                    self._worse.touch()
                await asyncio.gather(*(self._ask(minute) for _ in range(count)))
                if minute % LOOK_EVERY == 0:
                    await self._wait_for_critics()
                    await asyncio.to_thread(self._look, minute)
            self._now = MINUTES + FEEDBACK_AFTER
            await self._wait_for_critics()
            for critic in critics:
                critic.cancel()
        for client in self._critics:
            client.close()
        while not self._clients.empty():
            self._clients.get_nowait().close()
        return self._day

    async def _wait_for_critics(self) -> None:
        """Wait until all feedback that is due was given."""
        await until(lambda: not self._giving and all(each[0] > self._now for each in self._said))

    async def _criticise(self, client: LeanClient) -> None:
        """Give feedback that is due, one after the other."""
        while True:
            due = next((place for place, each in enumerate(self._said) if each[0] <= self._now), None)
            if due is None:
                await asyncio.sleep(0.01)
                continue
            _, decision, score, key = self._said.pop(due)
            said = {"decision": decision, "score": score, "source": "thumbs"}
            self._giving += 1
            await self._post(client, "/v1/feedback", said, key)
            self._giving -= 1

    async def _post(self, client: LeanClient, path: str, body: dict[str, Any], key: str) -> dict[str, Any]:
        headers, status, raw = {"authorization": f"Bearer {key}"}, 503, b""
        for _ in range(MAX_TRIES):  # a busy machine may keep the store from answering in time
            try:
                status, raw = await client.post(path, body, headers)
            except (asyncio.IncompleteReadError, OSError):  # it was idle for too long, and was closed
                client.close()
            if status != 503:
                break
            await asyncio.sleep(RETRY_S)
        assert status == 200, raw[:500]
        found: dict[str, Any] = json.loads(raw)
        return found

    async def _ask(self, minute: int) -> None:
        prompt, key = self._rng.choice(self._prompts), self._rng.choice(self._keys)
        graded = self._rng.random() < self._day.plan.feedback
        body = {"model": "auto", "messages": list(prompt.messages), "uniroute": {"metadata": True}}
        client = await self._clients.get()
        try:
            found = await self._post(client, "/v1/chat/completions", body, key)
        finally:
            self._clients.put_nowait(client)
        said, right = found["uniroute"], self._is_right(prompt, found["choices"][0]["message"]["content"])
        self._day.answers.append(Answer(minute, said["model"], right, said["expected_error"], said["cost_usd"], graded))
        if graded:
            self._said.append((minute + FEEDBACK_AFTER, said["decision"], float(right), key))

    def _is_right(self, prompt: ValidationPrompt, answer: str) -> bool:
        """Grade by the validation prompt's own grader, as measuring does."""
        known = prompt.id, answer
        if known not in self._graded:
            self._graded[known] = prompt.grader.grade(answer) == 1.0
        return self._graded[known]

    def _look(self, minute: int) -> None:
        observed = {name: _card(self._proxy, name).get("observed") for name in MODELS}
        flagged = {name: each for name, each in observed.items() if each and (each["change"] or each["differs"])}
        self._day.looks.append(Look(minute, flagged))
        if flagged and not self._day.page:
            with Site(self._proxy, None).visitor() as visitor:  # type: ignore[arg-type]
                self._day.page = visitor.get("/quality").text


def lines(day: Day) -> Iterator[str]:
    plan, total, spending = day.plan, day.report["total"], day.report["spending"]
    graded = sum(each.graded for each in day.answers)
    yield f"{len(day.answers):,} requests in {day.seconds:.0f} s, {graded:,} graded; measured on {PROMPTS} prompts"
    for name in MODELS:
        parts = [[each for each in day.answers if each.model == name and half(each.minute)] for half in (_am, _pm)]
        wrong = ["–" if not part else f"{sum(not each.right for each in part) / len(part):.3f}" for part in parts]
        measured = f"measured {day.measured[name][0]:.3f} on {day.measured[name][1]:.0f} labels"
        yield f"  {name}: {measured}; {sum(map(len, parts)):,} answers, wrong {wrong[0]} before noon, {wrong[1]} after"
    yield from _alarms(day)
    for title, half in (("before noon", _am), ("the whole day", lambda _: True)):
        part = [each for each in day.answers if half(each.minute)]
        expected = sum(each.expected_error or 0.0 for each in part) / len(part)
        yield f"{title}: {sum(not each.right for each in part) / len(part):.4f} wrong, {expected:.4f} expected"
    yield f"report: {total['requests']:,} requests, {total['scored']:,} with feedback"
    for name in ("expected_error", "baseline_expected_error", "error_difference", "observed_error"):
        yield f"report, {name}: {total[name]:.4f} ({total[f'{name}_low']:.4f} to {total[f'{name}_high']:.4f})"
    yield (
        f"report: ${total['cost_usd']:.6f} spent, ${total['saved_usd']:.6f} saved, measuring"
        f" ${spending['profiling']['usd']:.6f}, net ${total['net_saved_usd']:.6f}"
    )
    yield (
        f"upstream's ledger: ${day.ledger_picousd / PICO:.6f} for the answers, ${day.profiling_picousd / PICO:.6f} for"
        f" measuring; off by ${abs(day.ledger_picousd / PICO - total['cost_usd']):.12f}"
    )
    yield f"feedback of {plan.feedback:.0%}, seed {plan.seed}, drop {plan.drop}"


def _am(minute: int) -> bool:
    return minute < NOON


def _pm(minute: int) -> bool:
    return minute >= NOON


def _alarms(day: Day) -> Iterator[str]:
    yield f"false alarms: {[(_clock(minute), name) for minute, name in day.false_alarms()] or 'none'}"
    if not day.plan.drop:
        return
    look = next((each for each in day.looks if each.minute >= NOON and WORSE in each.flagged), None)
    if look is None:
        yield f"{WORSE} became worse at noon, and nothing was told"
        return
    found = look.flagged[WORSE]
    after = len(day.labels(NOON, look.minute - FEEDBACK_AFTER))
    change = found["change"] or {}
    yield (
        f"{WORSE} became worse at noon, and is flagged at {_clock(look.minute)}, after {after} labels of answers since"
        f" (of {len(day.labels(0, NOON))} before); since {change.get('since', '–')}, statistic"
        f" {change.get('statistic', math.nan):.2f}"
    )
    alone = day.all_labels_test(*day.measured[WORSE])
    yield f"a test of all labels alone: {'not within the day' if alone is None else _clock(alone)}"


def _clock(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=Plan.requests)
    parser.add_argument("--feedback", type=float, default=Plan.feedback)
    parser.add_argument("--drop", type=float, default=Plan.drop)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    arguments = parser.parse_args()
    plan = Plan(arguments.requests, arguments.feedback, arguments.drop, arguments.seed)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        day = simulate(Path(folder), plan)
    for line in lines(day):
        print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
