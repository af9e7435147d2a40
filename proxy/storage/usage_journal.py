"""A write-ahead journal of usage records: files of numbered lines that one process writes and then reads as a queue.

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
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

# Read at once. A line has a few hundred.
CHUNK_BYTES = 256 * 1024

_SEQUENCE = re.compile(rb'\{"seq": (\d{1,15}), ')


@dataclass(frozen=True, slots=True)
class Entry:
    """One record as it was written."""

    sequence: int
    """From 1, ascending within a journal."""
    text: str
    """A JSON object, with the sequence number as its `seq`."""
    fields: Mapping[str, Any]


@dataclass(slots=True)
class Batch:
    """The records that come next in a journal."""

    entries: list[Entry] = field(default_factory=list)
    broken: int = 0
    """Lines among them that cannot be read."""
    end: int = 0
    """Offset in the file of what comes after this batch."""

    @property
    def last(self) -> int:
        """The number of the last record; 0: there is none."""
        return self.entries[-1].sequence if self.entries else 0


class Journal:
    """One file. It is locked while its process lives; if the lock is free, the process is gone."""

    def __init__(self, folder: Path, journal_id: str | None = None) -> None:
        self.id = journal_id or uuid.uuid4().hex
        self.path = folder / f"{self.id}.jsonl"
        self.size = 0
        self.applied = 0  # sequence number of the last record that is known to have reached Redis
        # Lines that the disk did not take, with their sequence numbers: later than any in the file.
        self.unwritten: deque[tuple[int, bytes]] = deque()
        self.failure: OSError | None = None  # of the last write
        self.sequence = 0  # of the last record that this process has written
        self._position = 0
        self._file: int | None = None

    @classmethod
    def claim_orphan(cls, path: Path) -> Journal | None:
        """Take over the journal of a process that is gone; return None if another process has it."""
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
    def fully_applied(self) -> bool:
        """True once Redis has every record that this process has written to it."""
        return self.applied >= self.sequence and not self.unwritten

    def append(self, text: str) -> None:
        """Write one JSON object that has fields. It never fails: what the disk does not take waits in memory."""
        self.sequence += 1
        line = f'{{"seq": {self.sequence}, {text[1:]}\n'.encode()
        if self.unwritten or not self._write(line):
            self.unwritten.append((self.sequence, line))

    def write_unwritten(self) -> None:
        """Write what the disk did not take before."""
        while self.unwritten and self._write(self.unwritten[0][1]):
            self.unwritten.popleft()

    def read(self, max_records: int) -> Batch:
        """Return the next records that are not acknowledged; again, if it is called again. Raise OSError."""
        batch = Batch(end=self._position)
        while len(batch.entries) < max_records:
            lines = self._lines(batch.end)
            if not lines:
                break
            for line in lines:
                if len(batch.entries) == max_records:
                    return batch
                batch.end += len(line)
                self._take(line, batch)
        for _, line in islice(self.unwritten, max_records - len(batch.entries)):
            self._take(line, batch)
        return batch

    def acknowledge(self, applied: int, end: int | None = None) -> None:
        """Note that Redis has every record up to the number `applied`.

        Args:
            end: offset in the file before which nothing has to be read any more. None: as before.
        """
        if end is not None:
            self._position = end
        self.applied = max(self.applied, applied)
        while self.unwritten and self.unwritten[0][0] <= self.applied:
            self.unwritten.popleft()

    def rewind(self, applied: int) -> None:
        """Read again from the record after `applied`: Redis went back to an older state, which ends there."""
        self.applied = applied
        self._position = 0

    def remove(self) -> None:
        """Remove the file. Raise OSError."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Close the file, which stays for the next process."""
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
        """Open the file, locked before it gets the name by which others look for it."""
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
        """Return whole lines from `start`; a last line that a kill has cut off is none."""
        if self._file is None:
            return []
        chunk = os.pread(self._file, CHUNK_BYTES, start)
        whole = chunk.rfind(b"\n") + 1
        if not whole and len(chunk) == CHUNK_BYTES:  # nothing of ours is that long
            return [chunk]
        return chunk[:whole].splitlines(keepends=True)

    def _take(self, line: bytes, batch: Batch) -> None:
        found = _SEQUENCE.match(line)
        sequence = int(found[1]) if found else None
        if sequence is not None and sequence <= self.applied:
            return
        fields = _parsed(line)
        if sequence is None or not isinstance(fields, dict):
            batch.broken += 1
            return
        batch.entries.append(Entry(sequence, line.decode().rstrip("\n"), fields))


def _parsed(line: bytes) -> Any:
    """Parse a line; return None if it is no JSON. NaN and half characters, which orjson rejects, are read too."""
    try:
        return orjson.loads(line)
    except ValueError:
        pass
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


log = logging.getLogger("uniroute.usage")

# A journal of this length is followed by another one, so that it can be removed when it is applied.
SEGMENT_BYTES = 8 * 2**20

# What the sequence number and the end of the line add to a record, at most.
MAX_FRAMING_BYTES = 26

# Records held in memory while the disk takes none.
MAX_UNWRITTEN = 50_000


class JournalDirectory:
    """The journals of one folder. Processes that share the folder keep out of each other's files by locks."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._segment_bytes = min(SEGMENT_BYTES, max(1, max_bytes // 4))
        self._current = Journal(folder)
        self._others: list[Journal] = []
        self._others_bytes = 0  # they no longer grow
        self._troubles: set[str] = set()

    @property
    def all(self) -> list[Journal]:
        """Return the journals, the oldest first as far as that is known."""
        return [*self._others, self._current]

    @property
    def current(self) -> Journal:
        """Return the journal in which the last record was written."""
        return self._current

    @property
    def bytes(self) -> int:
        return self._others_bytes + self._current.size

    def append(self, text: str) -> bool:
        """Write a record; return False if `max_bytes` are full of records that Redis has not taken."""
        current = self._writable()
        if self._others_bytes + current.size + len(text) + MAX_FRAMING_BYTES > self._max_bytes:
            return self._dropped(f"the usage journals in {self._folder} have {self._max_bytes} bytes, their limit")
        if len(current.unwritten) >= MAX_UNWRITTEN:
            return self._dropped(f"{MAX_UNWRITTEN} usage records wait for room in {self._folder}")
        current.append(text)
        if current.unwritten:
            self._warn_once("disk", f"usage is kept in memory: {current.path} cannot be written ({current.failure})")
        return True

    def write_unwritten(self) -> None:
        """Write what the disk did not take before."""
        if self._current.unwritten:
            self._current.write_unwritten()
        if not self._current.unwritten and "disk" in self._troubles:
            self._troubles.discard("disk")
            log.info("the usage journal %s is written again", self._current.path)

    def claim_orphans(self) -> None:
        """Take over the journals that processes which are gone have left, before this start or since."""
        ours = {journal.path for journal in self.all}
        for path in sorted(self._folder.glob("*.jsonl")):
            journal = None if path in ours else Journal.claim_orphan(path)
            if journal is not None:
                log.info("the usage journal %s of a process that has ended is read (%d bytes)", path, journal.size)
                self._others.insert(0, journal)
                self._others_bytes += journal.size

    def is_open(self, journal: Journal) -> bool:
        """Return whether more may be written to it."""
        return journal is self._current

    def remove(self, journal: Journal) -> None:
        """Remove a journal that is applied. Raise OSError."""
        journal.remove()
        if journal is self._current:
            self._current = Journal(self._folder)
        else:
            self._others.remove(journal)
            self._others_bytes -= journal.size
        self._troubles.discard("full")

    def close(self) -> int:
        """Leave the files to the next process; return how many records were in memory alone, and are lost."""
        self.write_unwritten()
        lost = len(self._current.unwritten)
        for journal in self.all:
            journal.close()
        self._current, self._others, self._others_bytes = Journal(self._folder), [], 0
        return lost

    def _writable(self) -> Journal:
        if self._current.size >= self._segment_bytes and not self._current.unwritten:
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
