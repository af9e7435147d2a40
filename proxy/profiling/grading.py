from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Any

import numpy as np

from proxy.concurrency import cancel_and_wait, end_process, run_uncancelled
from proxy.profiling.model_client import TRUNCATED, ModelAnswer, ModelCallError, RetryingClient, cost_of, max_cost_usd
from router_core.clustering import ClusterMap, assign_prompts
from router_core.errors import InvalidOutcomes
from router_core.evaluation.outcomes import OutcomeRow, parse_row, read_rows
from router_core.profiles import Profile, measure
from router_core.text import rfc3339
from router_core.types import Assignment, Doubles, Embedder, Price
from router_core.validation.families.registry import builtin_validation_set
from router_core.validation.graders import MAX_ANSWER_CHARS, JudgeGrader
from router_core.validation.grading_process import CPU_S, READY
from router_core.validation.loading import load_validation_set
from router_core.validation.validation_set import ValidationPrompt, ValidationSet, choose_prompts

log = logging.getLogger("uniroute.jobs")

START_TIMEOUT_S = 60.0

# On a busy machine the child's CPU_S seconds take longer.
GRADE_TIMEOUT_S = 30.0

# After so long without an answer to grade the child is ended: it holds about 60 MB.
IDLE_TIMEOUT_S = 30.0


class GradingProcess:
    """Grade in a child process, which is started when an answer is there to be graded, and again when it has died."""

    def __init__(self) -> None:
        self._child: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()
        self._idle_task: asyncio.Task[None] | None = None

    async def grade(self, prompt: ValidationPrompt, answer: str) -> float | None:
        """Return the score in [0, 1], or None where the grader has none, fails, or takes too much time or memory.

        Raises:
            ModelCallError: no child can be started here.
        """
        async with self._lock:
            await cancel_and_wait(self._idle_task)
            try:
                return await self._grade(prompt, answer)
            finally:
                self._idle_task = asyncio.create_task(self._end_when_idle(), name="uniroute-grading-idle")

    async def close(self) -> None:
        async with self._lock:
            await cancel_and_wait(self._idle_task)
            await self._end()

    async def _grade(self, prompt: ValidationPrompt, answer: str) -> float | None:
        request = {"grader": prompt.grader.to_json(), "answer": answer[:MAX_ANSWER_CHARS]}
        line = json.dumps(request).encode() + b"\n"
        used = self._child is not None
        reply = await self._ask(line)
        if reply is None and used:  # it may have been killed before it got this answer
            reply = await self._ask(line)
        if reply is None:
            reply = {"score": None, "error": f"it took more than {CPU_S} s of CPU time, or ended its process"}
        if reply["error"]:
            log.warning(
                "an answer of %d characters to the validation prompt %r could not be graded by %s: %s;"
                " it counts as unlabelled",
                len(answer),
                prompt.id,
                prompt.grader.type,
                reply["error"],
            )
        score: float | None = reply["score"]
        return score

    async def _ask(self, request: bytes) -> dict[str, Any] | None:
        """Return the child's reply; None, and no child is left, if there is none in time."""
        child = self._child
        if child is None or child.returncode is not None:
            child = await self._start()
        reply: dict[str, Any] | None = None
        with suppress(TimeoutError, ValueError, OSError):
            try:
                async with asyncio.timeout(GRADE_TIMEOUT_S):
                    reply = json.loads(await _exchange(child, request))
            finally:
                if reply is None:  # cancelled, too: the next answer must not be given the score of this one
                    await self._end()
        return reply

    async def _start(self) -> asyncio.subprocess.Process:
        ready = b""
        try:
            child = await run_uncancelled(self._spawn())
            async with asyncio.timeout(START_TIMEOUT_S):
                ready = await _line(child)
        except (TimeoutError, OSError) as error:
            raise ModelCallError(f"no process could be started to grade in: {error or 'it took too long'}") from error
        finally:
            if ready != READY:
                await self._end()
        if ready != READY:
            raise ModelCallError("the process to grade in ended at its start: is the machine out of memory?")
        return child

    async def _spawn(self) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        self._child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "router_core.validation.grading_process",
            stdin=pipe,
            stdout=pipe,
            stderr=asyncio.subprocess.DEVNULL,
            env=_environment(os.environ),
            start_new_session=True,  # Ctrl-C is for the server, which then ends it
        )
        return self._child

    async def _end_when_idle(self) -> None:
        """End the child after IDLE_TIMEOUT_S. The next answer cancels this."""
        await asyncio.sleep(IDLE_TIMEOUT_S)
        await self._end()

    async def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await run_uncancelled(end_process(child))


async def _exchange(child: asyncio.subprocess.Process, request: bytes) -> bytes:
    """Send a request and return the reply, one line; it is empty if the process has ended."""
    assert child.stdin is not None
    child.stdin.write(request)
    await child.stdin.drain()
    return await _line(child)


async def _line(child: asyncio.subprocess.Process) -> bytes:
    assert child.stdout is not None
    return await child.stdout.readline()


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without keys, and with one thread: numpy would reserve memory for each core."""
    kept = {name: environ[name] for name in ("PATH", "HOME", "PYTHONPATH", "TMPDIR", "LANG") if name in environ}
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), kept.get("PYTHONPATH"))))
    return {**kept, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}


MAX_JUDGE_TOKENS = 512


class JudgeNotConfigured(Exception):
    """A prompt needs a judge, and no model is configured to be it."""


class GraderRunner:
    """Grade answers by rules in the grading process, or by a judge model."""

    def __init__(
        self,
        client_of: Callable[[str], tuple[RetryingClient, Price | None]],
        default: str | None,
        grading: GradingProcess,
    ) -> None:
        self._find = client_of
        self._default = default
        self._grading = grading
        self._found: dict[str, tuple[RetryingClient, Price | None]] = {}

    def check(self, prompts: tuple[ValidationPrompt, ...], *, capped: bool) -> None:
        """Check before anything is spent that every prompt can be graded, or raise JudgeNotConfigured."""
        for prompt in prompts:
            if not isinstance(prompt.grader, JudgeGrader):
                continue
            name = prompt.grader.model or self._default
            if name is None:
                raise JudgeNotConfigured(f"the validation prompt {prompt.id!r} needs a judge: set judge_model")
            if capped and self._client_of(name)[1] is None:
                raise JudgeNotConfigured(f"no price is known for the judge {name!r}, so max_usd cannot be kept")

    def _client_of(self, name: str) -> tuple[RetryingClient, Price | None]:
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def max_cost_usd(self, prompt: ValidationPrompt, answer_tokens: int) -> float:
        """Return the USD to reserve for judging one answer, a token of which is at most 8 bytes."""
        if not isinstance(prompt.grader, JudgeGrader):
            return 0.0
        client, price = self._client_of(prompt.grader.model or self._default or "")
        request = {"messages": prompt.grader.messages(prompt.text, "")}
        if price is None:
            return 0.0
        return max_cost_usd(request, client.record, price, MAX_JUDGE_TOKENS) + (
            8 * answer_tokens * price.input_cost_per_token
        )

    async def score(self, prompt: ValidationPrompt, answer: ModelAnswer) -> tuple[float | None, float]:
        """Return the score, None if there is none, and the judge's cost in USD. Raise ModelCallError."""
        grader = prompt.grader
        if not isinstance(grader, JudgeGrader):
            return await self._grading.grade(prompt, answer.text), 0.0
        client, price = self._client_of(grader.model or self._default or "")
        request = {"messages": grader.messages(prompt.text, answer.text)}
        verdict = await client.complete(request, MAX_JUDGE_TOKENS)
        cost = 0.0
        if price is not None:
            cost = cost_of(verdict, price, max_cost_usd(request, client.record, price, MAX_JUDGE_TOKENS))
        return (None if verdict.finish_reason == TRUNCATED else grader.parse(verdict.text)), cost


BUILTIN = "builtin"


@dataclass(frozen=True)
class AssignedPrompts:
    """Validation prompts and, in the same order, their clusters."""

    prompts: tuple[ValidationPrompt, ...]
    assignment: Assignment
    clusters: int

    def select(self, count: int, answered: Collection[str] = (), *, tools: bool = True) -> AssignedPrompts:
        """Select up to `count` prompts, spread over clusters and families: the same ones for every model.

        Args:
            answered: ids of prompts that are all selected first; others fill up to `count`.
            tools: whether the model may be offered tools. If not, the next prompts without them take their place.
        """
        families = [prompt.family for prompt in self.prompts]
        ranked = choose_prompts(self.assignment, len(self.prompts), families=families).tolist()
        fixed = {row for row in ranked if self.prompts[row].id in answered}
        others = [row for row in ranked if row not in fixed and (tools or not self.prompts[row].tools)]
        wanted = fixed.union(others[: max(0, count - len(fixed))])
        rows = [row for row in ranked if row in wanted]
        assignment = Assignment(self.assignment.ids[rows], self.assignment.weights[rows])
        return AssignedPrompts(tuple(self.prompts[row] for row in rows), assignment, self.clusters)


class ValidationPrompts:
    """Load the configured validation set, and assign its prompts to clusters, when it is first needed."""

    def __init__(self, source: str, embedder: Embedder) -> None:
        self._source = source
        self._embedder = embedder
        self._assigned: dict[str, AssignedPrompts] = {}
        self._assigning = asyncio.Lock()

    async def load(self, cluster_map: ClusterMap) -> AssignedPrompts:
        """Return the prompts with their clusters on this map, or raise InvalidValidationSet."""
        async with self._assigning:
            if cluster_map.id not in self._assigned:
                self._assigned = {cluster_map.id: await asyncio.to_thread(self._assign, cluster_map)}
            return self._assigned[cluster_map.id]

    def _assign(self, cluster_map: ClusterMap) -> AssignedPrompts:
        validation_set = self._read()
        assignment = assign_prompts([prompt.text for prompt in validation_set], self._embedder, cluster_map)
        return AssignedPrompts(validation_set.prompts, assignment, cluster_map.size)

    def _read(self) -> ValidationSet:
        return builtin_validation_set() if self._source == BUILTIN else load_validation_set(Path(self._source))


def column(values: list[float | None]) -> Doubles:
    """Return (n,) float64, with NaN for None."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


UNKNOWN = float("nan")


def profile_from_outcomes(path: Path, model: str, cluster_map: ClusterMap, embedder: Embedder) -> Profile:
    """Read a profile from an outcomes file, or raise InvalidOutcomes if a line is broken or no line scores `model`."""
    rows = rows_of(path, model)
    assignment = assign_prompts([row.prompt for row in rows], embedder, cluster_map)
    return measure(
        cluster_map.id,
        cluster_map.size,
        assignment,
        _column(row.scores[model] for row in rows),
        output_tokens=_column(row.output_tokens.get(model, UNKNOWN) for row in rows),
        seconds=_column(row.seconds.get(model, UNKNOWN) for row in rows),
        measured_at=rfc3339(time()),
    )


def rows_of(path: Path, model: str) -> list[OutcomeRow]:
    """Return the rows that have a score of `model`."""
    scored: list[OutcomeRow] = []
    others: set[str] = set()
    for where, line in read_rows(path):
        row = parse_row(where, line)
        others.update(row.scores)
        if model in row.scores:
            scored.append(row)
    if not scored:
        raise InvalidOutcomes(f"{path}: no line scores {model!r}; it has {', '.join(sorted(others)) or 'no lines'}")
    return scored


def _column(values: Iterable[float]) -> Doubles:
    return np.fromiter(values, dtype=np.float64)
