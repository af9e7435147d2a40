"""Log lines to standard error: one write each, and no waiting for whoever reads them. What is said is others' business.

A line is with the kernel before the call returns, so that a process that is killed loses none that it has said. Where
the reader is behind, and a write would wait, lines queue up to MOST_WAITING bytes and a thread waits in our place.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import deque

from router_core.text import plain

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"

SECOND = "%Y-%m-%dT%H:%M:%S%z"

MAX_WAITING = 4 * 2**20

LAST_S = 1.0
"""At the end of the process a reader that is behind is waited for so long."""


class LineFormatter(logging.Formatter):
    """The time of a line is written once a second."""

    def __init__(self) -> None:
        super().__init__(FORMAT, SECOND)
        self._second = (-1, "")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  its name
        """What others wrote, a stored name or an upstream's words, ends no line and writes on no terminal."""
        line = super().formatMessage(record)
        return line if line.isprintable() else plain(line.encode("utf-8", "backslashreplace").decode(), lines=False)

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: ARG002, N802  its name
        return self.time(record.created)

    def time(self, created: float) -> str:
        """`created`: Unix seconds."""
        second, text = self._second
        if second != int(created):
            second, text = self._second = int(created), time.strftime(SECOND, self.converter(int(created)))
        return text


class NonBlockingHandler(logging.Handler):
    """Of any thread. Its formatter is a LineFormatter, unless another is set."""

    def __init__(self, fd: int = 2) -> None:
        super().__init__()
        self._lines = LineFormatter()
        self.formatter = self._lines
        self.dropped = 0
        """Lines that found no room, or no reader at all."""
        self._fd = fd
        self._ready = select.poll()
        self._ready.register(fd, select.POLLOUT)
        self._one_at_a_time = threading.Lock()
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._unreported_drops = 0
        self._writer: threading.Thread | None = None

    @property
    def is_plain(self) -> bool:
        """Whether a line from `say` is what a record would become."""
        return not self.filters and self.level <= logging.INFO and isinstance(self.formatter, LineFormatter)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except (TypeError, ValueError, LookupError):  # arguments that do not fit their message
            self.handleError(record)
            return
        self._put(line)

    def say(self, level: str, name: str, message: str) -> None:
        """The line of a record that nobody else is to see: none is made."""
        self._put(f"{self._lines.time(time.time())} {level} {name} {message}")

    def flush(self) -> None:
        writer = self._writer
        if writer is not None:
            writer.join(LAST_S)

    def _put(self, line: str) -> None:
        data = f"{line}\n".encode("utf-8", "backslashreplace")
        with self._one_at_a_time:
            left = data if self._waiting else self._write(data)
            if left:
                self._wait_with(left)

    def _write(self, data: bytes) -> bytes:
        """What is left of it where the next write would wait. A pipe that is ready takes PIPE_BUF bytes at once."""
        while data and self._ready.poll(0):
            try:
                data = data[os.write(self._fd, data[: select.PIPE_BUF]) :]
            except BlockingIOError:
                break
            except OSError:  # nobody reads any more, or the disk is full
                self.dropped += 1
                return b""
        return data

    def _wait_with(self, data: bytes) -> None:
        if self._waiting_bytes + len(data) > MAX_WAITING:
            self.dropped += 1
            self._unreported_drops += 1
            return
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_waiting, name="uniroute-log", daemon=True)
            self._writer.start()

    def _write_waiting(self) -> None:
        """Until nothing waits any more. What is being written stays first in line, so that nothing overtakes it."""
        while (data := self._next_waiting()) is not None:
            self._write_blocking(data)
            with self._one_at_a_time:
                self._waiting.popleft()
                self._waiting_bytes -= len(data)

    def _next_waiting(self) -> bytes | None:
        with self._one_at_a_time:
            if not self._waiting and self._unreported_drops:
                self._wait_with(self._told())
            if not self._waiting:
                self._writer = None
                return None
            return self._waiting[0]

    def _write_blocking(self, data: bytes) -> None:
        while data := self._write(data):
            self._ready.poll()

    def _told(self) -> bytes:
        untold, self._unreported_drops = self._unreported_drops, 0
        what = f"{untold} log lines were dropped: standard error was not read"
        return f"{self._lines.time(time.time())} WARNING uniroute {what}\n".encode()


def info(log: logging.Logger, message: str) -> None:
    """`log.info(message)`. Where a LineHandler alone would see the record, none is made, which takes 10 us."""
    if not log.isEnabledFor(logging.INFO):
        return
    handler = _only_handler(log)
    if handler is None:
        log.info(message, stacklevel=2)
    else:
        handler.say("INFO", log.name, message)


def _only_handler(log: logging.Logger) -> NonBlockingHandler | None:
    if log.filters:
        return None
    found: NonBlockingHandler | None = None
    at: logging.Logger | None = log
    while at is not None:
        for handler in at.handlers:
            if found is not None or not isinstance(handler, NonBlockingHandler) or not handler.is_plain:
                return None
            found = handler
        at = at.parent if at.propagate else None
    return found


def lines_dropped() -> int:
    """By the handlers of this process."""
    handlers = {*logging.getLogger().handlers, *logging.getLogger("uniroute").handlers}
    return sum(handler.dropped for handler in handlers if isinstance(handler, NonBlockingHandler))
