from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
START_S = 120.0


def tree(pid: int) -> list[int]:
    """Return the process and all its descendants."""
    found, waiting = [], [pid]
    while waiting:
        current = waiting.pop()
        found.append(current)
        for task in Path(f"/proc/{current}/task").glob("*"):
            waiting += [int(child) for child in (task / "children").read_text().split()]
    return found


def cpu_s(pid: int) -> float:
    """Return user and system seconds of the whole tree, and of its processes that have ended and were waited for.

    Those of the living are the scheduler's own, in nanoseconds, with their threads that have ended.
    """
    total = 0.0
    for one in tree(pid):
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        total += sum(map(int, fields[13:15])) / TICKS + time.clock_gettime(_cpu_clock(one))
    return total


def _cpu_clock(pid: int) -> int:
    """Return the clock of a process's CPU time, as clock_getcpuclockid(3) does."""
    return (~pid << 3) | 2


@dataclass(frozen=True)
class Memory:
    """Hold MiB. Shared pages count once in the proportional size, and in each one's resident size."""

    rss: float
    pss: float


def memory(pid: int) -> Memory:
    parts = [memory_of_one(one) for one in tree(pid)]
    return Memory(sum(part.rss for part in parts), sum(part.pss for part in parts))


def memory_of_one(pid: int) -> Memory:
    """Return the memory of one process without its descendants."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    mib = {name: int(rest.split()[0]) / 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return Memory(mib["Rss"], mib["Pss"])


def core_busy_s(core: int) -> float:
    """Return the seconds that a core was busy, other guests of the machine included."""
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name == f"cpu{core}":
            user, nice, system, _idle, _waiting, irq, soft, stolen = map(int, fields[:8])
            return (user + nice + system + irq + soft + stolen) / TICKS
    raise ValueError(f"there is no core {core}")


@contextmanager
def started(
    command: Sequence[object],
    *,
    core: int | None = None,
    environ: Mapping[str, str] | None = None,
    log: Path,
    cwd: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process in a group of its own, on one core if given, and end it with all its descendants."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*map(str, command)],
            env=None if environ is None else dict(environ),
            cwd=cwd,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def until_it_answers(
    ask: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, limit_s: float = START_S
) -> float:
    """Return the seconds until `ask` is true; it may raise OSError. SystemExit with the log's end if it never is."""
    began = time.monotonic()
    while time.monotonic() - began < limit_s and process.poll() is None:
        try:
            if ask():
                return time.monotonic() - began
        except OSError:
            pass
        time.sleep(0.01)
    raise SystemExit(f"it did not start: {log.read_text('utf-8', 'replace')[-2000:]}")
