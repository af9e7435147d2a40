"""A usage journal: a file of numbered lines that one process writes and then reads as a queue. Knows no Redis.

A record is one `write` and no fsync: in the file it survives the death of every process, not that of the machine.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

CHUNK = 256 * 1024
"""Bytes that are read at once. A line is a few hundred."""

_NUMBER = re.compile(rb'\{"seq": (\d{1,15}), ')


@dataclass(frozen=True, slots=True)
class Entry:
    """One record as it was written down."""

    number: int
    """From 1, ascending within a journal."""
    text: str
    """A JSON object, the number in it as `seq`."""
    fields: Mapping[str, Any]


@dataclass(slots=True)
class Batch:
    """What comes next in a journal."""

    entries: list[Entry] = field(default_factory=list)
    broken: int = 0
    """Lines on the way that cannot be read."""
    end: int = 0
    """Offset in the file up to which everything is in this batch or was before it."""


class Journal:
    """One file. It is locked for as long as its process lives; a lock that is free says that the process is gone."""

    def __init__(self, folder: Path, journal_id: str | None = None) -> None:
        self.id = journal_id or uuid.uuid4().hex
        self.path = folder / f"{self.id}.jsonl"
        self.size = 0
        self.applied = 0
        """Number of the last record that is known to have reached Redis."""
        self.waiting: deque[tuple[int, bytes]] = deque()
        """Lines that the disk did not take, with their numbers: later than any in the file."""
        self.failure: OSError | None = None
        """Why the last write failed."""
        self._number = 0
        self._position = 0
        self._file: int | None = None

    @classmethod
    def claim_orphan(cls, path: Path) -> Journal | None:
        """The journal of a process that is gone, now ours to read; None if somebody has it."""
        journal = cls(path.parent, path.stem)
        try:
            journal._file = os.open(path, os.O_RDONLY)
        except OSError:
            return None
        try:
            fcntl.flock(journal._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = os.fstat(journal._file)
        except OSError:
            found = None
        if found is None or found.st_nlink == 0:  # read to its end and removed by another just now
            journal.close()
            return None
        journal.size = found.st_size
        return journal

    @property
    def through(self) -> bool:
        """Whether all that this process wrote to it is applied."""
        return self.applied >= self._number and not self.waiting

    def append(self, text: str) -> None:
        """Write down one JSON object with fields. Never fails: what the disk does not take waits in memory."""
        self._number += 1
        line = f'{{"seq": {self._number}, {text[1:]}\n'.encode()
        if self.waiting or not self._write(line):
            self.waiting.append((self._number, line))

    def write_waiting(self) -> None:
        """Try again what the disk did not take."""
        while self.waiting and self._write(self.waiting[0][1]):
            self.waiting.popleft()

    def read(self, most: int) -> Batch:
        """The next records that were not applied, at most so many. Reading again gives them again. Raises OSError."""
        batch = Batch(end=self._position)
        while len(batch.entries) < most:
            lines = self._lines(batch.end)
            if not lines:
                break
            for line in lines:
                if len(batch.entries) == most:
                    return batch
                batch.end += len(line)
                self._take(line, batch)
        for _, line in self._first_waiting(most - len(batch.entries)):
            self._take(line, batch)
        return batch

    def mark(self, batch: Batch) -> None:
        """All of the batch is applied."""
        self._position = batch.end
        if batch.entries:
            self.applied = max(self.applied, batch.entries[-1].number)
        while self.waiting and self.waiting[0][0] <= self.applied:
            self.waiting.popleft()

    def rewind(self, applied: int) -> None:
        """Redis went back to an older state of itself, which has the records up to this one."""
        self.applied = applied
        self._position = 0

    def remove(self) -> None:
        """Raises OSError."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """The file stays, for whoever comes next."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, line: bytes) -> bool:
        try:
            file = self._opened() if self._file is None else self._file
            written = os.write(file, line)
            if written < len(line):  # a full disk takes what fits, and the next line must not begin behind that
                os.ftruncate(file, self.size)
                self.failure = OSError(f"only {written} of {len(line)} bytes were taken")
                return False
        except OSError as error:
            self.failure = error
            return False
        self.size += written
        self.failure = None
        return True

    def _opened(self) -> int:
        """Locked before it gets the name by which others look for it."""
        if self._file is None:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            unnamed = self.path.with_suffix(".new")
            file = os.open(unnamed, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                unnamed.rename(self.path)
            except OSError:
                os.close(file)
                raise
            self._file = file
        return self._file

    def _lines(self, start: int) -> list[bytes]:
        """Whole lines from there; a last one that was cut off by a kill is none."""
        if self._file is None:
            return []
        chunk = os.pread(self._file, CHUNK, start)
        whole = chunk.rfind(b"\n") + 1
        if not whole and len(chunk) == CHUNK:  # nothing of ours is that long
            return [chunk]
        return chunk[:whole].splitlines(keepends=True)

    def _first_waiting(self, most: int) -> Iterator[tuple[int, bytes]]:
        for place in range(min(most, len(self.waiting))):
            yield self.waiting[place]

    def _take(self, line: bytes, batch: Batch) -> None:
        found = _NUMBER.match(line)
        number = int(found[1]) if found else None
        if number is not None and number <= self.applied:
            return
        fields = _parsed(line)
        if number is None or not isinstance(fields, dict):
            batch.broken += 1
            return
        batch.entries.append(Entry(number, line.decode().rstrip("\n"), fields))


def _parsed(line: bytes) -> Any:
    """None where it is no JSON. NaN and half characters, which are none to orjson, are read as they always were."""
    try:
        return orjson.loads(line)
    except ValueError:
        pass
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


log = logging.getLogger("uniroute.usage")

SEGMENT_BYTES = 8 * 2**20
"""A journal that is this long is followed by another, so that it can be removed when it is through."""

NUMBERED = 26
"""Bytes, at most, that the number and the end of the line add to a record."""

MAX_WAITING = 50_000
"""Records held in memory while the disk takes none."""


class JournalDirectory:
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
        if len(current.waiting) >= MAX_WAITING:
            return self._dropped(f"{MAX_WAITING} usage records wait for room in {self._folder}")
        current.append(text)
        if current.waiting:
            self._warn_once("disk", f"usage is kept in memory: {current.path} cannot be written ({current.failure})")
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
            journal = None if path in ours else Journal.claim_orphan(path)
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
        self._warn_once("full", f"usage records are dropped: {why}")
        return False

    def _warn_once(self, trouble: str, message: str) -> None:
        if trouble not in self._troubles:
            self._troubles.add(trouble)
            log.error("%s", message)
