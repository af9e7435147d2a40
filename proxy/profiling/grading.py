from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

from proxy.concurrency import cancel_and_wait, run_uncancelled
from proxy.errors import ResponseTooLarge, UpstreamError
from proxy.storage.models import ModelRecord
from proxy.storage.usage import ObservedTraffic, TokenCounts, believed, cost_usd, parse_usage, usage_of
from proxy.upstream.circuit_breaker import parse_retry_after
from proxy.upstream.payload import JSONPayload
from router_core.pricing import max_price_usd
from router_core.types import Price
from router_core.validation.graders import MAX_ANSWER_CHARS, JudgeGrader
from router_core.validation.grading_process import CPU_S, READY
from router_core.validation.validation_set import ValidationPrompt


class Budget:
    """The money of one job. `max_usd` None: no limit. Used on one event loop."""

    def __init__(self, max_usd: float | None, spent_usd: float = 0.0) -> None:
        self._left = math.inf if max_usd is None else max_usd - spent_usd
        self._in_flight = 0
        self._settled = asyncio.Condition()

    async def reserve(self, usd: float) -> bool:
        """Reserve an amount. Wait while pending answers may give money back; return False once it can never suffice."""
        async with self._settled:
            while usd > self._left and self._in_flight:
                await self._settled.wait()
            if usd > self._left:
                return False
            self._left -= usd
            self._in_flight += 1
            return True

    async def add(self, usd: float) -> bool:
        """Reserve more for a prompt. It never waits: two prompts could wait for each other for ever."""
        async with self._settled:
            enough = usd <= self._left
            if enough:
                self._left -= usd
            return enough

    async def settle(self, reserved: float, spent: float) -> None:
        """Release what was not spent."""
        async with self._settled:
            self._left += reserved - spent
            self._in_flight -= 1
            self._settled.notify_all()


RETRYABLE_STATUSES = frozenset({408, 409, 425, 429})

MAX_REASON_CHARS = 300

# A longer answer is cut before it is graded.
MAX_GRADED_CHARS = 100_000

STATUS_HINTS: Mapping[int, str] = {
    400: "the provider refuses the request: check litellm_params",
    401: "the provider refuses the key: check litellm_params.api_key and its variable",
    403: "the provider refuses the key for this model",
    404: "check litellm_params.model and api_base",
    429: "the provider limits the rate or the quota is used up: try later, or with a lower profile.concurrency",
}

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """The answer of a model. None: the provider did not say."""

    text: str
    finish_reason: str | None
    counts: TokenCounts
    reasoned: bool
    seconds: float

    @property
    def output_tokens(self) -> int | None:
        """Return the tokens that are billed, reasoning included."""
        return self.counts.output_tokens


class ModelCallError(Exception):
    """A model gave no answer; the message says why and what may help."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        retry_after_s: float | None = None,
        permanent: bool = False,
    ) -> None:
        """`permanent`: another attempt would fail in the same way, whatever the status."""
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self._permanent = permanent

    @property
    def retryable(self) -> bool:
        if self._permanent:
            return False
        return self.status is None or self.status in RETRYABLE_STATUSES or self.status >= 500


class ModelClient(Protocol):
    async def complete(
        self, record: ModelRecord, messages: Sequence[Message], *, max_tokens: int, timeout_s: float
    ) -> ModelAnswer:
        """Return the model's answer. Raise ModelCallError, also when `timeout_s` is over."""


class Upstream(Protocol):
    async def complete(self, record: ModelRecord, body: Mapping[str, Any]) -> JSONPayload:
        """Return an OpenAI chat completion, or raise UpstreamError."""


class UpstreamModelClient:
    """Call models through the same client that serves requests, so that a profile measures what is served."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    async def complete(
        self, record: ModelRecord, messages: Sequence[Message], *, max_tokens: int, timeout_s: float
    ) -> ModelAnswer:
        body = {"model": record.name, "messages": [dict(message) for message in messages], "max_tokens": max_tokens}
        started = monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                completion = (await self._upstream.complete(record, body)).body
        except TimeoutError as error:
            raise ModelCallError(f"{record.name} did not answer within {timeout_s:g} s") from error
        except UpstreamError as error:
            raise _failed(error) from error
        return read_answer(completion, monotonic() - started, record.name)


def read_answer(completion: Mapping[str, Any], seconds: float, model: str) -> ModelAnswer:
    """Read the first choice of an OpenAI completion, or raise ModelCallError if there is none."""
    choices = completion.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, Mapping) else None
    if not isinstance(choice, Mapping) or not isinstance(message, Mapping):
        raise ModelCallError(f"{model} answered without any choice", status=502)
    counts = parse_usage(usage_of(completion))
    text = _text(message.get("content"))
    counts = believed(counts, ObservedTraffic(0, len(text.encode("utf-8", "replace")), unreported_bytes=0))
    return ModelAnswer(
        text=text,
        finish_reason=_word(choice.get("finish_reason")),
        counts=counts,
        reasoned=bool(counts.reasoning_tokens or message.get("reasoning_content") or message.get("reasoning")),
        seconds=seconds,
    )


def _failed(error: UpstreamError) -> ModelCallError:
    """Translate an error. The upstream's own message is left out: some providers repeat the key in it."""
    hint = STATUS_HINTS.get(error.status or 0)
    reason = f"{error}; {hint}" if hint else str(error)
    return ModelCallError(
        reason[:MAX_REASON_CHARS],
        status=error.status,
        retry_after_s=parse_retry_after(error.headers, time.time()),
        permanent=isinstance(error, ResponseTooLarge),
    )


def _text(content: Any) -> str:
    """Return the text of a message, no longer than is graded."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content[:MAX_GRADED_CHARS] if isinstance(part, Mapping)]
        content = "".join(part[:MAX_GRADED_CHARS] for part in parts if isinstance(part, str))
    return content[:MAX_GRADED_CHARS] if isinstance(content, str) else ""


def _word(value: Any) -> str | None:
    return value[:40] if isinstance(value, str) else None


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
        child = self._child
        if child is None or child.returncode is not None:
            child = await self._start()
        request = {"grader": prompt.grader.to_json(), "answer": answer[:MAX_ANSWER_CHARS]}
        answered = False
        try:
            async with asyncio.timeout(GRADE_TIMEOUT_S):
                reply = json.loads(await _exchange(child, json.dumps(request).encode() + b"\n"))
            answered = True
        except (TimeoutError, ValueError, OSError):
            reply = {"score": None, "error": f"it took more than {CPU_S} s of CPU time, or ended its process"}
        finally:
            if not answered:  # also when this task is cancelled: the next answer must not be given this one's score
                await self._end()
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
        if child is None:
            return
        if child.returncode is None:
            child.kill()
        await run_uncancelled(_gone(child))


async def _gone(child: asyncio.subprocess.Process) -> None:
    """Wait for the end of the process, and close its pipes."""
    await child.communicate()


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


# Added to the limit of an answer if the model reasons first: reasoning counts against the limit.
REASONING_TOKENS = 4096

# For the roles and marks that a provider puts around a message.
TOKENS_PER_MESSAGE = 16


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, and after which wait, a failed call is repeated."""

    attempts: int = 5
    first_wait_s: float = 0.5
    max_wait_s: float = 20.0
    """Also the longest `retry-after` that is honoured."""
    timeout_s: float = 120.0
    """For one attempt."""

    def wait_s(self, attempt: int, failure: ModelCallError) -> float:
        """Return the wait that the provider asked for, else an exponential one; with jitter, so that calls spread."""
        wait = self.first_wait_s * 2**attempt if failure.retry_after_s is None else failure.retry_after_s
        return min(self.max_wait_s, wait) * random.uniform(1.0, 1.25)  # noqa: S311


class RetryingClient:
    """Call one model for one job, and repeat failed calls. If the provider says to wait, all prompts wait."""

    def __init__(self, client: ModelClient, record: ModelRecord, retry_policy: RetryPolicy) -> None:
        self.record = record
        self._client = client
        self._retry_policy = retry_policy
        self._not_before = 0.0

    async def complete(self, messages: Sequence[Message], max_tokens: int) -> ModelAnswer:
        """Return the answer. Raise ModelCallError if another attempt is not worth it."""
        for attempt in range(self._retry_policy.attempts):
            await asyncio.sleep(max(0.0, self._not_before - monotonic()))
            try:
                return await self._client.complete(
                    self.record, messages, max_tokens=max_tokens, timeout_s=self._retry_policy.timeout_s
                )
            except ModelCallError as failure:
                if not failure.retryable or attempt + 1 == self._retry_policy.attempts:
                    raise
                self._not_before = monotonic() + self._retry_policy.wait_s(attempt, failure)
        raise ModelCallError(
            f"{self.record.name} was not asked: retry_policy.attempts is {self._retry_policy.attempts}"
        )


def configured_token_limit(record: ModelRecord) -> int | None:
    """Return the token limit of the model's own parameters: users get answers cut there too."""
    limits = (record.litellm_params.get(name) for name in ("max_tokens", "max_completion_tokens"))
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def cost_of(answer: ModelAnswer, price: Price, at_most: float) -> float:
    """Return the USD of one answer; `at_most` if the provider did not count."""
    usd = cost_usd(answer.counts, price)
    return at_most if usd is None else usd


def max_cost_usd(messages: Sequence[Message], record: ModelRecord, price: Price, max_tokens: int) -> float:
    """Return the USD to reserve before a call: a token is at least one byte of what is sent."""
    sent = [message["content"] for message in messages] + [str(record.litellm_params.get("system") or "")]
    prompt_tokens = sum(len(text.encode("utf-8", "replace")) + TOKENS_PER_MESSAGE for text in sent)
    return max_price_usd(prompt_tokens, max_tokens, price, audio_input=False, audio_output=False, images=False)


MAX_JUDGE_TOKENS = 512

TRUNCATED = "length"


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
        messages = prompt.grader.messages(prompt.text, "")
        if price is None:
            return 0.0
        return max_cost_usd(messages, client.record, price, MAX_JUDGE_TOKENS) + (
            8 * answer_tokens * price.input_cost_per_token
        )

    async def score(self, prompt: ValidationPrompt, answer: ModelAnswer) -> tuple[float | None, float]:
        """Return the score, None if there is none, and the judge's cost in USD. Raise ModelCallError."""
        grader = prompt.grader
        if not isinstance(grader, JudgeGrader):
            return await self._grading.grade(prompt, answer.text), 0.0
        client, price = self._client_of(grader.model or self._default or "")
        messages = grader.messages(prompt.text, answer.text)
        verdict = await client.complete(messages, MAX_JUDGE_TOKENS)
        cost = 0.0
        if price is not None:
            cost = cost_of(verdict, price, max_cost_usd(messages, client.record, price, MAX_JUDGE_TOKENS))
        return (None if verdict.finish_reason == TRUNCATED else grader.parse(verdict.text)), cost
