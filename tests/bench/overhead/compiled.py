"""Run the load generator and the upstream as C programs, or as Python where there is no compiler."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Self

from tests.bench.overhead.load import Job, Measured
from tests.bench.overhead.processes import cpu_s
from tests.bench.overhead.upstream import write_answers
from tests.support.program import ROOT

HERE = Path(__file__).parent
LOAD, UPSTREAM = "load", "upstream"
# Longer than a job by so much, and the generator hangs.
LOST_S = 120.0


@cache
def program(name: str, *, compiler: str | None = "cc") -> tuple[str, ...]:
    """Return the command, without arguments."""
    found = shutil.which(compiler) if compiler else None
    if found is None:
        return (sys.executable, "-m", f"tests.bench.overhead.{name}")
    sources = [HERE / f"{name}.c", *HERE.glob("*.h")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    binary = Path(tempfile.gettempdir()) / f"uniroute-bench-{os.getuid()}" / f"{name}-{digest}"
    if not binary.exists():
        binary.parent.mkdir(mode=0o700, exist_ok=True)
        fresh = binary.with_suffix(f".{os.getpid()}")
        subprocess.run([found, "-O2", "-o", str(fresh), str(sources[0])], check=True)
        fresh.replace(binary)
    return (str(binary),)


class Upstream:
    """Run the model server on a core."""

    def __init__(
        self,
        folder: Path,
        core: int,
        command: tuple[str, ...] | None = None,
        *,
        answers: Path | None = None,
        certificate: Path | None = None,
    ) -> None:
        """
        Args:
            answers: its records; None: those of OpenAI's format, written to `folder`.
            certificate: with its key, for TLS, which the program in C does not speak.
        """
        self._command = [*(command or program(UPSTREAM)), str(answers or write_answers(folder / "answers"))]
        self._command += [str(certificate)] if certificate else []
        self._scheme = "https" if certificate else "http"
        self._core = core
        self.port = 0

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            preexec_fn=lambda: os.sched_setaffinity(0, {self._core}),
        )
        assert self._process.stdout
        self.port = int(self._process.stdout.readline())
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(10)

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.port}/v1"

    @property
    def cpu_s(self) -> float:
        return cpu_s(self._process.pid)


@contextmanager
def begun(job: Job, core: int) -> Iterator[None]:
    """Send load while the block lasts; its measurements are dropped."""
    process = subprocess.Popen(
        [*program(LOAD), *job.arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def run(job: Job, core: int, command: tuple[str, ...] | None = None) -> tuple[Measured, float]:
    """Return the measurements, and the CPU seconds that it took itself. Raises CalledProcessError: no connection."""
    before = os.times()
    done = subprocess.run(
        [*(command or program(LOAD)), *job.arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
        timeout=job.warm_s + job.seconds + LOST_S,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return Measured(**json.loads(done.stdout)), spent
