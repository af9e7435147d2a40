from __future__ import annotations

import logging
from typing import Final

from router_core.text import plain

MAX_COMPLAINTS: Final = 1000

MAX_SHOWN: Final = 300


class Complaints:
    """One line for each odd value, however often it is read."""

    def __init__(self, log: logging.Logger, words: str = "stored entry skipped") -> None:
        self._log = log
        self._words = words
        self._made: set[str] = set()

    def make(self, where: str, what: object) -> None:
        """Say it, unless it was said before or too much was said."""
        complaint = plain(f"{where}: {what}", lines=False)[:MAX_SHOWN]
        if complaint not in self._made and len(self._made) < MAX_COMPLAINTS:
            self._made.add(complaint)
            self._log.warning("%s: %s", self._words, complaint)
