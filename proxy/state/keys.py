"""Client keys: how one is made and recognised, and the local memory that keys were ever required. No Redis."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from pathlib import Path

from proxy.safety.private_files import private_opener

PREFIX = "ur-"
SECRET = re.compile(rf"{PREFIX}[A-Za-z0-9_-]{{43}}")
"""What a secret looks like, wherever one was put by mistake."""


def new_secret() -> str:
    """Shown once, never stored."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(secret: str) -> str:
    """What is stored and compared. A lone surrogate is hashed like any other garbage."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


class KeyLatch:
    """Set by the first client key, never cleared: neither revoking the last key nor an empty store opens the door."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "keys-required"

    @property
    def closed(self) -> bool:
        return self._path.exists()

    def close(self) -> None:
        if not self.closed:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(self._path, "w", opener=private_opener) as file:
                file.write("A client key was made once; calls without one are refused.\n")
                file.flush()
                os.fsync(file.fileno())
