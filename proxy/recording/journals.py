"""The usage journals of a data directory: the one that this process writes, and those it has to bring to Redis."""

from __future__ import annotations

import logging
from pathlib import Path

from proxy.recording.journal import Journal

log = logging.getLogger("uniroute.usage")

SEGMENT_BYTES = 8 * 2**20
"""A journal that is this long is followed by another, so that it can be removed when it is through."""
NUMBERED = 26
"""Bytes, at most, that the number and the end of the line add to a record."""
MOST_WAITING = 50_000
"""Records held in memory while the disk takes none."""


class Journals:
    """Used on one event loop. Processes that share the folder keep out of each other's files by locks."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._segment_bytes = min(SEGMENT_BYTES, max(1, max_bytes // 4))
        self._current = Journal(folder)
        self._others: list[Journal] = []
        self._others_bytes = 0
        """They do not grow any more, and are added up once."""
        self._troubles: set[str] = set()

    @property
    def all(self) -> list[Journal]:
        """The oldest first, as far as that is known."""
        return [*self._others, self._current]

    @property
    def bytes(self) -> int:
        return self._others_bytes + self._current.size

    def append(self, text: str) -> bool:
        """Whether the record is kept. It is not where `max_bytes` are full of what Redis did not take yet."""
        current = self._writable()
        if self._others_bytes + current.size + len(text) + NUMBERED > self._max_bytes:
            return self._dropped(f"the usage journals in {self._folder} have {self._max_bytes} bytes, their limit")
        if len(current.waiting) >= MOST_WAITING:
            return self._dropped(f"{MOST_WAITING} usage records wait for room in {self._folder}")
        current.append(text)
        if current.waiting:
            self._complain("disk", f"usage is kept in memory: {current.path} cannot be written ({current.failure})")
        return True

    def write_waiting(self) -> None:
        """Try again what the disk did not take."""
        if self._current.waiting:
            self._current.write_waiting()
        if not self._current.waiting and "disk" in self._troubles:
            self._troubles.discard("disk")
            log.info("the usage journal %s is written again", self._current.path)

    def adopt(self) -> None:
        """Take over what processes that are gone have left, here or in a start before."""
        ours = {journal.path for journal in self.all}
        for path in sorted(self._folder.glob("*.jsonl")):
            journal = None if path in ours else Journal.left_behind(path)
            if journal is not None:
                log.info("the usage journal %s of a process that has ended is read (%d bytes)", path, journal.size)
                self._others.insert(0, journal)
                self._others_bytes += journal.size

    def is_open(self, journal: Journal) -> bool:
        """Whether more may be written to it."""
        return journal is self._current

    def remove(self, journal: Journal) -> None:
        """It is through. Raises OSError."""
        journal.remove()
        if journal is self._current:
            self._current = Journal(self._folder)
        else:
            self._others.remove(journal)
            self._others_bytes -= journal.size
        self._troubles.discard("full")

    def close(self) -> int:
        """Leave the files to whoever comes next. How many records were in memory alone, and are lost."""
        self.write_waiting()
        lost = len(self._current.waiting)
        for journal in self.all:
            journal.close()
        self._current, self._others, self._others_bytes = Journal(self._folder), [], 0
        return lost

    def _writable(self) -> Journal:
        if self._current.size >= self._segment_bytes and not self._current.waiting:
            self._others.append(self._current)
            self._others_bytes += self._current.size
            self._current = Journal(self._folder)
        return self._current

    def _dropped(self, why: str) -> bool:
        self._complain("full", f"usage records are dropped: {why}")
        return False

    def _complain(self, trouble: str, message: str) -> None:
        if trouble not in self._troubles:
            self._troubles.add(trouble)
            log.error("%s", message)
