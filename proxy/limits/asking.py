"""Questions to Redis that requests wait for: many in one round trip, not for long, and none while it is silent."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from redis.exceptions import NoScriptError, RedisError
from redis.exceptions import TimeoutError as RanOut

from proxy.concurrency import end
from proxy.storage.redis import Store, StoreUnavailable, exchange, packed

TIMEOUT_S = 0.05
SLICE_S = 0.01
"""A silent Redis is waited for in slices. While this process itself is busy a slice takes longer, and that is no
silence: each ends only after the event loop has looked for an answer."""
PAUSE_S = 1.0
MOST_AT_ONCE = 32
"""In one round trip. Redis runs them before it answers the first: more of them would look like a silence."""
_WHAT = "check the limits of a key"
_ENDED = f"could not {_WHAT}: the server is shutting down"


class NotAsked(StoreUnavailable):
    """Redis was silent a moment ago. Nothing was sent to it."""


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    script: str
    """Its digest."""
    key: str
    arguments: Collection[str | int | float]
    answer: asyncio.Future[Any]


class Asking:
    """Scripts, asked over one connection at a time. One per process."""

    def __init__(self, store: Store, scripts: Collection[str], timeout_s: float = TIMEOUT_S) -> None:
        self._store = store
        self._timeout_s = timeout_s
        self._digests = {script: store.client.register_script(script).sha for script in scripts}
        self._waiting: deque[Question] = deque()
        self._silent: str | None = None
        self._asking: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None

    @property
    def silent(self) -> bool:
        return self._silent is not None

    def ask(self, script: str, key: str, arguments: Collection[str | int | float]) -> asyncio.Future[Any]:
        """The answer of one of the scripts; it comes also where nobody waits for it any more.

        Raises:
            NotAsked: at once, after a silence, until Redis answers again.
            StoreUnavailable: an error in place of an answer, or none in time; it may have been heard all the same.
        """
        if self._silent is not None:
            raise NotAsked(self._silent)
        question = Question(self._digests[script], key, arguments, asyncio.get_running_loop().create_future())
        self._waiting.append(question)
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask_all(), name="uniroute-limits-asking")
        return question.answer

    async def close(self) -> None:
        await end(self._asking, self._listening)
        self._fail_all(self._waiting, NotAsked(_ENDED))

    async def _ask_all(self) -> None:
        while self._waiting:
            asked = [self._waiting.popleft() for _ in range(min(MOST_AT_ONCE, len(self._waiting)))]
            try:
                for question, answer in zip(asked, await self._in_time(asked), strict=True):
                    _tell(question, answer)
            except StoreUnavailable as error:
                self._fall_silent(error, asked)
            finally:
                self._fail_all(asked, StoreUnavailable(_ENDED))  # whatever happened, nobody waits for ever

    async def _in_time(self, questions: list[Question]) -> list[Any]:
        asking = asyncio.create_task(self._send(questions))
        try:
            for _ in range(max(1, round(self._timeout_s / SLICE_S))):
                await asyncio.wait({asking}, timeout=SLICE_S)
                if asking.done():
                    if not _ran_out(asking):
                        return asking.result()
                    asking = asyncio.create_task(self._send(questions))  # this process was too busy to see an answer
        finally:
            if not asking.done():
                asking.add_done_callback(_forget)
                asking.cancel()
        waited = f"{self._timeout_s * 1000:.0f} ms"
        raise StoreUnavailable(f"could not {_WHAT}: Redis at {self._store.name} did not answer within {waited}")

    async def _send(self, questions: list[Question]) -> list[Any]:
        """In one round trip; in a few where Redis does not know a script yet."""
        async with self._store.asking(_WHAT) as client:
            answers = await exchange(client, [_command(question) for question in questions])
            if not any(isinstance(answer, NoScriptError) for answer in answers):
                return answers
            for script in self._digests:
                await client.script_load(script)
        return await self._send(questions)

    def _fall_silent(self, error: StoreUnavailable, questions: list[Question]) -> None:
        self._silent = str(error)
        self._fail_all(questions, error)
        self._fail_all(self._waiting, NotAsked(str(error)))
        self._waiting.clear()
        self._listening = asyncio.create_task(self._listen(), name="uniroute-limits-listening")

    def _fail_all(self, questions: Iterable[Question], error: StoreUnavailable) -> None:
        for question in questions:
            _fail(question, error)

    async def _listen(self) -> None:
        """Until Redis answers again, and in time, so that no request has to find out."""
        loop = asyncio.get_running_loop()
        while self._silent is not None:
            asked = loop.time()
            if await self._store.available() and loop.time() - asked <= self._timeout_s:
                self._silent = None
            else:
                await asyncio.sleep(PAUSE_S)


def _command(question: Question) -> bytes:
    return packed(("EVALSHA", question.script, "1", question.key, *map(str, question.arguments)))


def _tell(question: Question, answer: Any) -> None:
    if isinstance(answer, RedisError):
        error = StoreUnavailable(f"could not {_WHAT}: Redis says {answer}")
        error.__cause__ = answer
        _fail(question, error)
    else:
        question.answer.set_result(answer)


def _fail(question: Question, error: StoreUnavailable) -> None:
    if not question.answer.done():
        question.answer.set_exception(error)


def _ran_out(asking: asyncio.Task[Any]) -> bool:
    error = asking.exception()
    return error is not None and isinstance(error.__cause__, (TimeoutError, RanOut))


def _forget(asking: asyncio.Task[Any]) -> None:
    _ = asking.cancelled() or asking.exception()  # looked at, so that asyncio does not log it as forgotten
