from __future__ import annotations

import random
import socket
from contextlib import suppress

# Below those that Linux, macOS and the BSDs take for outgoing connections.
PORTS = (20_000, 32_000)
_given: set[int] = set()


def free_port() -> int:
    """Return a port of loopback that no outgoing connection is given before, or while, its owner is started."""
    while True:
        port = random.SystemRandom().randrange(*PORTS)
        with suppress(OSError):
            if port not in _given:
                socket.create_server(("127.0.0.1", port)).close()
                _given.add(port)
                return port
