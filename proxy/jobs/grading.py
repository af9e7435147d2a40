"""Grading in a child process, which an answer may hold up or break without harm to what this process serves."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from proxy.concurrency import end, to_its_end
from proxy.jobs.answering import AnswerFailed
from router_core.validation.graders import MAX_ANSWER_CHARS
from router_core.validation.grading_process import CPU_S, READY
from router_core.validation.prompts import ValidationPrompt

log = logging.getLogger("uniroute.jobs")

START_TIMEOUT_S = 60.0
GRADE_TIMEOUT_S = 30.0
"""On a busy machine the child's CPU_S seconds take longer than by themselves."""
IDLE_S = 30.0
"""After so long without an answer to grade the child is ended: it holds about 60 MB."""


class GradingProcess:
    """One child at a time, started when the first answer is there to be graded, and anew when it died."""

    def __init__(self) -> None:
        self._child: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._retiring: asyncio.Task[None] | None = None

    async def grade(self, prompt: ValidationPrompt, answer: str) -> float | None:
        """Return the score in [0, 1], or None where the grader has none, fails, or takes too much time or memory.

        Raises:
            AnswerFailed: no child can be started here.
        """
        async with self._turn:
            await end(self._retiring)
            try:
                return await self._grade(prompt, answer)
            finally:
                self._retiring = asyncio.create_task(self._retire(), name="uniroute-grading-idle")

    async def close(self) -> None:
        async with self._turn:
            await end(self._retiring)
            await self._end()

    async def _grade(self, prompt: ValidationPrompt, answer: str) -> float | None:
        child = self._child
        if child is None or child.returncode is not None:
            child = await self._start()
        request = {"grader": prompt.grader.to_json(), "answer": answer[:MAX_ANSWER_CHARS]}
        answered = False
        try:
            async with asyncio.timeout(GRADE_TIMEOUT_S):
                reply = json.loads(await _asked(child, json.dumps(request).encode() + b"\n"))
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
                *(len(answer), prompt.id, prompt.grader.type, reply["error"]),
            )
        score: float | None = reply["score"]
        return score

    async def _start(self) -> asyncio.subprocess.Process:
        ready = b""
        try:
            child = await to_its_end(self._spawned())
            async with asyncio.timeout(START_TIMEOUT_S):
                ready = await _line(child)
        except (TimeoutError, OSError) as error:
            raise AnswerFailed(f"no process could be started to grade in: {error or 'it took too long'}") from error
        finally:
            if ready != READY:
                await self._end()
        if ready != READY:
            raise AnswerFailed("the process to grade in ended at its start: is the machine out of memory?")
        return child

    async def _spawned(self) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        self._child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "router_core.validation.grading_process"),
            stdin=pipe,
            stdout=pipe,
            stderr=asyncio.subprocess.DEVNULL,
            env=_environment(os.environ),
            start_new_session=True,  # Ctrl-C is for the server, which then ends it
        )
        return self._child

    async def _retire(self) -> None:
        """End the child after IDLE_S, unless somebody takes a turn before, who ends this."""
        await asyncio.sleep(IDLE_S)
        await self._end()

    async def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        if child.returncode is None:
            child.kill()
        await to_its_end(_gone(child))


async def _gone(child: asyncio.subprocess.Process) -> None:
    """The process is over, and its pipes are closed."""
    await child.communicate()


async def _asked(child: asyncio.subprocess.Process, request: bytes) -> bytes:
    """The line that it answers; empty where it ended before."""
    assert child.stdin is not None
    child.stdin.write(request)
    await child.stdin.drain()
    return await _line(child)


async def _line(child: asyncio.subprocess.Process) -> bytes:
    assert child.stdout is not None
    return await child.stdout.readline()


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """No keys; and one thread, since numpy's would reserve memory for each core."""
    kept = {name: environ[name] for name in ("PATH", "HOME", "PYTHONPATH", "TMPDIR", "LANG") if name in environ}
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), kept.get("PYTHONPATH"))))
    return {**kept, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
