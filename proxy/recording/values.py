"""Where counters and gauges keep their numbers: in this process, or in memory that its workers share.

Workers write 64-bit floats to files in shared memory, one file each, and whoever is scraped adds them up: what a worker
has counted outlives it. A worker that is started takes over the files of one that has died, and counts on.

    FOLDER/0.index   a line of JSON for each series: [kind, metric, labels, first cell, cells, began at]
    FOLDER/0.values  the cells, in segments of SEGMENT_BYTES
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Union

log = logging.getLogger("uniroute.metrics")

SEGMENT_BYTES = 2**16
SEGMENT_CELLS = SEGMENT_BYTES // 8
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  a folder of our own is made in it
PREFIX = "uniroute-metrics-"
YOUNG_S = 60.0

Labels = tuple[str, ...]
Kind = Literal["counter", "gauge"]
Segment = Union["memoryview[float]", list[float]]
Cells = tuple[Segment, int]
"""Where the first of a series' cells is."""


@dataclass(frozen=True)
class Series:
    kind: Kind
    began: float
    """Unix seconds."""
    cells: Cells
    count: int

    @property
    def numbers(self) -> list[float]:
        segment, at = self.cells
        return list(segment[at : at + self.count])

    def set(self, number: float) -> None:
        segment, at = self.cells
        for cell in range(at, at + self.count):
            segment[cell] = number


class Values:
    """Of this process alone."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._segments: list[Segment] = []
        self._free = 0
        self._series: dict[str, dict[Labels, Series]] = {}

    def series(self, kind: Kind, metric: str, labels: Labels, count: int = 1) -> Cells:
        """The cells of a series, made where it is new: zeros."""
        found = self._series.setdefault(metric, {}).get(labels)
        if found is None:
            first = self._reserved(count)
            found = Series(kind, self._clock(), self._cells(first), count)
            self._keep(metric, labels, first, found)
            self._series[metric][labels] = found
        return found.cells

    def read(self, metric: str) -> Iterator[Mapping[Labels, Series]]:
        """Of each process that counts: a gauge of those alone that live, a counter of all."""
        yield self._series.get(metric, {})

    def refresh(self) -> None:
        """Find out what others have: once, before several metrics are read."""

    def _reserved(self, count: int) -> int:
        """The first of so many cells, which no segment's end parts."""
        if self._free % SEGMENT_CELLS + count > SEGMENT_CELLS:
            self._free += SEGMENT_CELLS - self._free % SEGMENT_CELLS
        first, self._free = self._free, self._free + count
        while len(self._segments) * SEGMENT_CELLS < self._free:
            self._segments.append(self._new_segment())
        return first

    def _cells(self, first: int) -> Cells:
        return self._segments[first // SEGMENT_CELLS], first % SEGMENT_CELLS

    def _new_segment(self) -> Segment:
        return [0.0] * SEGMENT_CELLS  # which is written faster than bytes are

    def _keep(self, metric: str, labels: Labels, first: int, series: Series) -> None:
        """Where others find it."""


class SharedValues(Values):
    """Of a worker, in a folder where others read them."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        """Raises OSError."""
        super().__init__(clock)
        self._folder = folder
        self._others: dict[Path, _Others] = {}
        self._living: set[Path] = set()
        self._path, self._index = _taken(folder)
        self._values = os.open(self._path.with_suffix(".values"), os.O_RDWR | os.O_CREAT, 0o600)
        self._take_over()

    def read(self, metric: str) -> Iterator[Mapping[Labels, Series]]:
        yield from super().read(metric)
        for path, others in self._others.items():
            found = others.series.get(metric, {})
            alive = path in self._living
            yield {labels: series for labels, series in found.items() if alive or series.kind == "counter"}

    def refresh(self) -> None:
        for path in self._folder.glob("*.index"):
            if path != self._path:
                self._others.setdefault(path, _Others(path)).refresh()
        self._living = {path for path in self._others if _is_held(path)}

    def _take_over(self) -> None:
        left = _Others(self._path)
        left.refresh()
        os.ftruncate(self._index, left.read_bytes)  # a line that was not written whole
        for _ in range(os.fstat(self._values).st_size // SEGMENT_BYTES):
            self._segments.append(self._mapped(len(self._segments)))
        for metric, found in left.series.items():
            for labels, series in found.items():
                first = left.firsts[metric, labels]
                ours = Series(series.kind, series.began, self._cells(first), series.count)
                self._series.setdefault(metric, {})[labels] = ours
                self._free = max(self._free, first + series.count)
                if ours.kind == "gauge":  # of a process that is no more; not a number: nothing is known yet
                    ours.set(math.nan)

    def _new_segment(self) -> Segment:
        """Of this process alone where there is no more room: the file is full, or its folder gone."""
        number = len(self._segments)
        try:
            # zeros, not a hole: a page for which there is no room would end the process when it is written to
            os.pwrite(self._values, bytes(SEGMENT_BYTES), number * SEGMENT_BYTES)
            return self._mapped(number)
        except OSError as error:
            log.warning("further metrics of this worker are seen by itself alone: %s", error)
            return super()._new_segment()

    def _mapped(self, number: int) -> Segment:
        return memoryview(mmap.mmap(self._values, SEGMENT_BYTES, offset=number * SEGMENT_BYTES)).cast("d")

    def _keep(self, metric: str, labels: Labels, first: int, series: Series) -> None:
        line = json.dumps([series.kind, metric, labels, first, series.count, series.began])
        try:
            os.write(self._index, f"{line}\n".encode())
        except OSError as error:
            log.warning("a series of %s is seen by this worker alone: %s", metric, error)


class _Others:
    """What another process writes, or has left: read on from where it was read to last."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._segments: list[Segment] = []
        self.read_bytes = 0
        self.series: dict[str, dict[Labels, Series]] = {}
        self.firsts: dict[tuple[str, Labels], int] = {}

    def refresh(self) -> None:
        with self._path.open("rb") as index:
            index.seek(self.read_bytes)
            new = index.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.read_bytes += len(whole)
        for line in whole.splitlines():
            kind, metric, labels, first, count, began = json.loads(line)
            known = Series(kind, began, self._cells(first), count)
            self.series.setdefault(metric, {})[tuple(labels)] = known
            self.firsts[metric, tuple(labels)] = first

    def _cells(self, first: int) -> Cells:
        number = first // SEGMENT_CELLS
        if number >= len(self._segments):
            with self._path.with_suffix(".values").open("rb") as values:
                for missing in range(len(self._segments), number + 1):
                    offset = missing * SEGMENT_BYTES
                    mapped = mmap.mmap(values.fileno(), SEGMENT_BYTES, offset=offset, access=mmap.ACCESS_READ)
                    self._segments.append(memoryview(mapped).cast("d"))
        return self._segments[number], first % SEGMENT_CELLS


@contextmanager
def shared_folder() -> Iterator[Path | None]:
    """A folder for the numbers of several workers. None where there cannot be one: each then counts for itself."""
    base = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    for left in base.glob(f"{PREFIX}*"):
        if _is_abandoned(left):
            shutil.rmtree(left, ignore_errors=True)
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    except OSError as error:
        log.warning("/metrics of each worker shows what it has counted itself: %s", error)
        yield None
        return
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    """Left by a supervisor that was killed, and none that is about to take its first file."""
    try:
        found = folder.stat()
    except OSError:
        return False
    ours, old = found.st_uid == os.getuid(), time.time() - found.st_mtime > YOUNG_S
    return ours and old and not any(_is_held(path) for path in folder.glob("*.index"))


def open_values(folder: Path | None) -> Values:
    """Those of a worker whose supervisor has made `folder`, else of a process that is alone."""
    if folder is not None:
        try:
            return SharedValues(folder)
        except OSError as error:
            log.warning("the metrics of this worker are seen by itself alone: %s", error)
    return Values()


def _taken(folder: Path) -> tuple[Path, int]:
    """The first index that no living process holds, held from now on."""
    number = 0
    while True:
        path = folder / f"{number}.index"
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            number += 1
        else:
            return path, file


def _is_held(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
