"""Routers that a request has passed: `x-uniroute-hops` lists an id for each, so that a chain which is a ring ends."""

from __future__ import annotations

import hashlib
import socket
from functools import lru_cache

from proxy.errors import LoopDetected

HOPS = "x-uniroute-hops"
MAX_HOPS = 3


@lru_cache(maxsize=8)
def instance_id(data_dir: str) -> str:
    """The same for all processes of one server."""
    return hashlib.sha256(f"{socket.gethostname()}\n{data_dir}".encode()).hexdigest()[:12]


def check_hops(hops: tuple[str, ...], own: str) -> None:
    """Raises LoopDetected where this server is among them, or they are too many."""
    if own in hops:
        raise LoopDetected(
            "loop detected: this request has been here before; one of this server's models leads back to it",
            param=HOPS,
        )
    if len(hops) > MAX_HOPS:
        raise LoopDetected(
            f"loop detected: this request has passed {len(hops)} routers, more than {MAX_HOPS}; let their models lead"
            " to providers and not to one another",
            param=HOPS,
        )
