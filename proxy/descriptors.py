"""How many file descriptors this process may hold, and how they are shared out. Opens nothing."""

from __future__ import annotations

import contextlib
import resource
from dataclasses import dataclass

RESERVED = 120
"""For everything but clients and models: the store's connections, files, pipes, jobs. About 60 are in use when idle."""
FEWEST = 8
MOST_CLIENTS = 20_000
"""Of one process, however many descriptors there are: a connection takes memory too."""


@dataclass(frozen=True)
class Shares:
    """A request holds a client's connection and a model's: half of what is left goes to each."""

    clients: int
    upstreams: int


def raise_limit() -> None:
    """The soft limit to the hard one: many systems set the soft one to 1,024 for programs that use select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MOST_CLIENTS + RESERVED
    target = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < target:
        with contextlib.suppress(OSError, ValueError):  # macOS refuses what is above its kern.maxfilesperproc
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))


def shares() -> Shares:
    """As the limit is now."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    each = MOST_CLIENTS if soft == resource.RLIM_INFINITY else (soft - RESERVED) // 2
    count = min(MOST_CLIENTS, max(FEWEST, each))
    return Shares(clients=count, upstreams=count)
