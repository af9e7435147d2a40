from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

from proxy.concurrency import cancel_and_wait

log = logging.getLogger("uniroute.upstream")

COMMAND = ("-m", "proxy.upstream.resolver_process")

START_S = 120.0
"""Until the first answer: litellm's import takes 3 s, and far longer on a machine that is busy with other starts."""

ANSWER_S = 30.0

IDLE_S = 3.0
"""After which the process ends: it holds 190 MiB, and other workers wait for their turn."""

MAX_WAITING = 1000

MAX_ANSWER = 2**20

_POLL_INTERVAL_S = 0.2

Answer = dict[str, Any]

Found = Mapping[str, Answer]


class NotAsked(Exception):
    """litellm could not be run."""


class Lookup:
    """One per process of ours, on one event loop; of several processes with one data folder one asks at a time."""

    def __init__(
        self,
        lock: Path,
        environment: Callable[[], dict[str, str]],
        known: Callable[[], Found],
        keep: Callable[[Found], Awaitable[None]],
        is_answer: Callable[[Any], bool],
    ) -> None:
        """
        Args:
            known: what was found before, by whichever process.
            keep: what is found goes there at once, so that it need not be found again.
        """
        self._lock = lock
        self._environment = environment
        self._known = known
        self._keep = keep
        self._is_answer = is_answer
        self._asked: dict[str, tuple[Mapping[str, Any], asyncio.Future[Answer | NotAsked]]] = {}
        """In order; the first is the one that is being asked."""
        self._more = asyncio.Event()
        self._working: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Questions that are not answered yet."""
        return len(self._asked)

    async def answers(self, questions: Mapping[str, Mapping[str, Any]]) -> dict[str, Answer]:
        """By the marks of the questions; one that somebody else asks too is asked once. Raises NotAsked."""
        if self.waiting + len(questions) > MAX_WAITING:
            raise NotAsked(f"{self.waiting} others wait for it")
        loop = asyncio.get_running_loop()
        for mark, question in questions.items():
            self._asked.setdefault(mark, (question, loop.create_future()))
        coming = {mark: self._asked[mark][1] for mark in questions}
        self._more.set()
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work(), name="uniroute-providers")
        await asyncio.wait(coming.values())
        found = {mark: answer.result() for mark, answer in coming.items()}
        for answer in found.values():
            if isinstance(answer, NotAsked):
                raise NotAsked(str(answer))
        return {mark: answer for mark, answer in found.items() if not isinstance(answer, NotAsked)}

    async def aclose(self) -> None:
        await cancel_and_wait(self._working)

    async def _work(self) -> None:
        reason = NotAsked("this process ends")
        started, asked = monotonic(), self.waiting
        try:
            async with self._turn():
                while self._asked:
                    log.info("litellm is asked who serves %d models, in a process of its own", self.waiting)
                    asked = self.waiting
                    await self._ask_all()
                    log.info("litellm said who serves %d models, after %.1f s", asked, monotonic() - started)
        except NotAsked as error:  # it would fail for the others as well, one after the other
            reason = error
            log.warning("litellm did not say who serves %d models: %s", self.waiting, error)
        finally:
            for mark in tuple(self._asked):
                self._settle(mark, reason)

    async def _ask_all(self) -> None:
        """By one process, until nothing more comes for a while, or it dies over a question. Raises NotAsked: it never
        answered."""
        async with _child(self._environment()) as child:
            within_s = START_S
            while await self._any():
                mark, (question, _) = next(iter(self._asked.items()))
                try:
                    answer = await _said(child, question, within_s)
                    if not self._is_answer(answer):
                        raise NotAsked("litellm said something else than was asked")
                except NotAsked as error:
                    if within_s == START_S:
                        raise
                    self._settle(mark, error)
                    return
                within_s = ANSWER_S
                await self._keep({mark: answer})
                self._settle(mark, answer)

    async def _any(self) -> bool:
        """Whether there is a question, or one comes soon."""
        self._more.clear()
        if not self._asked:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(IDLE_S):
                    await self._more.wait()
        return bool(self._asked)

    def _settle(self, mark: str, answer: Answer | NotAsked) -> None:
        _, coming = self._asked.pop(mark)
        if not coming.done():
            coming.set_result(answer)

    @asynccontextmanager
    async def _turn(self) -> AsyncGenerator[None]:
        """Once no other process asks; what others find meanwhile need not be asked. Without a folder to agree in, at
        once."""
        with contextlib.ExitStack() as holding:
            lock = None
            with contextlib.suppress(OSError):
                self._lock.parent.mkdir(parents=True, exist_ok=True)
                lock = holding.enter_context(self._lock.open("w"))
            while lock is not None and not _locked(lock) and self._asked:
                await asyncio.sleep(_POLL_INTERVAL_S)
                self._settle_known()
            self._settle_known()
            yield

    def _settle_known(self) -> None:
        known = self._known()
        for mark in [mark for mark in self._asked if mark in known]:
            self._settle(mark, known[mark])


def _locked(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@asynccontextmanager
async def _child(environment: dict[str, str]) -> AsyncGenerator[asyncio.subprocess.Process]:
    """Gone at the end, whatever it was at. Raises NotAsked."""
    pipe = asyncio.subprocess.PIPE
    try:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, *COMMAND),
            stdin=pipe,
            stdout=pipe,
            stderr=asyncio.subprocess.DEVNULL,
            env=environment,
            limit=MAX_ANSWER,
            start_new_session=True,  # Ctrl-C is for us, who then end it
        )
    except OSError as error:
        raise NotAsked(f"no process for it: {error}") from error
    try:
        yield child
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()


async def _said(child: asyncio.subprocess.Process, question: Mapping[str, Any], within_s: float) -> Any:
    """Raises NotAsked."""
    assert child.stdin is not None  # as it was started
    assert child.stdout is not None
    try:
        async with asyncio.timeout(within_s):
            child.stdin.write(json.dumps(question).encode() + b"\n")
            await child.stdin.drain()
            line = await child.stdout.readline()
    except TimeoutError:
        raise NotAsked(f"litellm did not say within {within_s:g} s") from None
    except (OSError, ValueError) as error:
        raise NotAsked(f"litellm did not say ({type(error).__name__})") from error
    if not line.endswith(b"\n"):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await child.wait()
        raise NotAsked(f"its process ended before it said (exit code {child.returncode})")
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise NotAsked("litellm said something else than was asked") from None


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """With the lock of a file that is written by one process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
