"""Print what a program can know of its process, then end it in the way that the first argument names."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def described() -> dict[str, object]:
    streams = [(s.fileno(), s.encoding, s.errors, s.line_buffering) for s in (sys.stdin, sys.stdout, sys.stderr)]
    spec = sys.modules["__main__"].__spec__
    return {
        "arguments": sys.argv,
        "environ": dict(os.environ),
        "folder": str(Path.cwd()),
        "path": sys.path,
        "module": spec and spec.name,
        "descriptors": sorted(_open_descriptors()),
        "streams": streams,
        "signals": {number.name: str(signal.getsignal(number)) for number in signal.Signals},
        "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        "leads its session": os.getsid(0) == os.getpid(),
        "umask": os.umask(0o022),
        "open files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "threads": threading.active_count(),
        "hour": time.localtime(0).tm_hour,
        "temporary": tempfile.gettempdir(),
    }


def _open_descriptors() -> Iterator[int]:
    for path in list(Path("/proc/self/fd").iterdir()):
        with suppress(OSError):  # of the listing itself
            os.fstat(int(path.name))
            yield int(path.name)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(described()))
    sys.stdout.flush()
    ending = sys.argv[1]
    if ending == "status":
        sys.exit(7)
    if ending == "error":
        raise RuntimeError(ending)
    if ending == "interrupt":
        signal.raise_signal(signal.SIGINT)
    if ending == "kill":
        signal.raise_signal(signal.SIGKILL)
