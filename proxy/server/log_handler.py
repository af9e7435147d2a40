"""Log lines on standard error: one write each, without waiting for the reader.

A line is in the kernel before the call returns, so a process that is killed loses none. Where the reader is behind and
a write would block, lines queue up to MAX_QUEUED_BYTES and a thread writes them.
"""

from __future__ import annotations

import json
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import orjson

from router_core.text import plain

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"

TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"

LogFormat = Literal["auto", "json", "text"]

MAX_QUEUED_BYTES = 4 * 2**20

# How long the end of the process waits for a reader that is behind.
FLUSH_TIMEOUT_S = 1.0


class Event(Protocol):
    """A message that is a set of facts: `str` is its text, `fields` are the members of its JSON."""

    def fields(self) -> Mapping[str, object]: ...


class LineFormatter(logging.Formatter):
    """Format each second's time only once."""

    def __init__(self) -> None:
        super().__init__(FORMAT, TIME_FORMAT)
        self._second = (-1, "")

    def line(self, created: float, level: str, name: str, message: object) -> str:
        """Format what a record without arguments and exception would become."""
        return f"{self.time(created)} {level} {name} {message}"

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        """Format a record. Text of others, as a stored name, can neither end a line nor control a terminal."""
        line = super().formatMessage(record)
        return line if line.isprintable() else plain(line.encode("utf-8", "backslashreplace").decode(), lines=False)

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: ARG002, N802  logging's name
        return self.time(record.created)

    def time(self, created: float) -> str:
        """Format Unix seconds."""
        second, text = self._second
        if second != int(created):
            second, text = self._second = int(created), time.strftime(TIME_FORMAT, self.converter(int(created)))
        return text


class JSONFormatter(LineFormatter):
    """Format each record as one line of JSON: time, level, logger, message, and the fields of an event.

    A record may have more fields: `log.warning(..., extra={"fields": {...}})`.
    """

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        message = record.msg if _is_event(record) else record.getMessage()
        more: dict[str, object] = dict(getattr(record, "fields", {}))
        if record.exc_info:
            more["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            more["stack"] = self.formatStack(record.stack_info)
        if not _is_event(record):
            message = str(message)
        return self._json(record.created, record.levelname, record.name, message, more)

    def line(self, created: float, level: str, name: str, message: object) -> str:
        return self._json(created, level, name, message, {})

    def time(self, created: float) -> str:
        """Format Unix seconds as RFC 3339, in UTC and with milliseconds."""
        return f"{super().time(created)[:19]}.{int(created % 1 * 1000):03d}Z"

    def _json(self, created: float, level: str, name: str, message: object, more: Mapping[str, object]) -> str:
        stated = {"time": self.time(created), "level": level, "logger": name}
        document: dict[str, Any]
        if type(message) is str:
            document = {**stated, "message": message, **more}
        else:  # an event, whose kind its logger says
            document = {**stated, "message": name.rpartition(".")[2], **message.fields(), **more}  # type: ignore[attr-defined]
        try:
            line = orjson.dumps(document).decode()
        except TypeError:  # half a character, an integer of more than 64 bits, or an object of any kind
            return json.dumps(document, default=str)
        # Of the characters that control a terminal, orjson leaves some as they are.
        return line if line.isprintable() else json.dumps(document, default=str)


def _is_event(record: logging.LogRecord) -> bool:
    return not isinstance(record.msg, str) and not record.args and hasattr(record.msg, "fields")


def is_json(log_format: LogFormat) -> bool:
    """Return whether lines are JSON: `auto` is text where standard error is a terminal, and JSON elsewhere."""
    return log_format == "json" or (log_format == "auto" and not os.isatty(2))


def formatter_class(log_format: LogFormat) -> type[LineFormatter]:
    return JSONFormatter if is_json(log_format) else LineFormatter


class NonBlockingHandler(logging.Handler):
    """Write log lines from any thread, formatted by a LineFormatter unless another formatter is set."""

    def __init__(self, fd: int = 2) -> None:
        super().__init__()
        self.formatter: logging.Formatter = LineFormatter()
        # Lines that found no room in the queue, or no reader at all.
        self.dropped = 0
        self._fd = fd
        self._ready = select.poll()
        self._ready.register(fd, select.POLLOUT)
        self._write_lock = threading.Lock()
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._unreported_drops = 0
        self._writer: threading.Thread | None = None

    @property
    def is_plain(self) -> bool:
        """Whether `emit_line` writes what a record would become."""
        return not self.filters and self.level <= logging.INFO and isinstance(self.formatter, LineFormatter)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except (TypeError, ValueError, LookupError):  # the arguments do not fit the message
            self.handleError(record)
            return
        self._send(line)

    def emit_line(self, level: str, name: str, message: str | Event) -> None:
        """Write the line of a record without making the record, which no other handler would get."""
        formatter = self.formatter if isinstance(self.formatter, LineFormatter) else LineFormatter()
        self._send(formatter.line(time.time(), level, name, message))

    def flush(self) -> None:
        writer = self._writer
        if writer is not None:
            writer.join(FLUSH_TIMEOUT_S)

    def _send(self, line: str) -> None:
        data = f"{line}\n".encode("utf-8", "backslashreplace")
        with self._write_lock:
            left = data if self._queue else self._write(data)
            if left:
                self._enqueue(left)

    def _write(self, data: bytes) -> bytes:
        """Return the rest of `data` once a write would block. A pipe that is ready takes PIPE_BUF bytes at once."""
        while data and self._ready.poll(0):
            try:
                data = data[os.write(self._fd, data[: select.PIPE_BUF]) :]
            except BlockingIOError:
                break
            except OSError:  # there is no reader any more, or the disk is full
                self.dropped += 1
                return b""
        return data

    def _enqueue(self, data: bytes) -> None:
        if self._queued_bytes + len(data) > MAX_QUEUED_BYTES:
            self.dropped += 1
            self._unreported_drops += 1
            return
        self._queue.append(data)
        self._queued_bytes += len(data)
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_queue, name="uniroute-log", daemon=True)
            self._writer.start()

    def _write_queue(self) -> None:
        """Write until the queue is empty. A line leaves it only when written, so that no other overtakes it."""
        while (data := self._next_line()) is not None:
            self._write_blocking(data)
            with self._write_lock:
                self._queue.popleft()
                self._queued_bytes -= len(data)

    def _next_line(self) -> bytes | None:
        with self._write_lock:
            if not self._queue and self._unreported_drops:
                self._enqueue(self._drop_report())
            if not self._queue:
                self._writer = None
                return None
            return self._queue[0]

    def _write_blocking(self, data: bytes) -> None:
        while data := self._write(data):
            self._ready.poll()

    def _drop_report(self) -> bytes:
        drops, self._unreported_drops = self._unreported_drops, 0
        what = f"{drops} log lines were dropped: standard error was not read"
        formatter = self.formatter if isinstance(self.formatter, LineFormatter) else LineFormatter()
        return f"{formatter.line(time.time(), 'WARNING', 'uniroute', what)}\n".encode()


def info(log: logging.Logger, message: str | Event) -> None:
    """Log at level INFO. Where a NonBlockingHandler alone gets the record, none is made, which saves 10 µs."""
    if not log.isEnabledFor(logging.INFO):
        return
    handler = _only_handler(log)
    if handler is None:
        log.info(message, stacklevel=2)
    else:
        handler.emit_line("INFO", log.name, message)


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
    """Return how many lines the handlers of this process have dropped."""
    handlers = {*logging.getLogger().handlers, *logging.getLogger("uniroute").handlers}
    return sum(handler.dropped for handler in handlers if isinstance(handler, NonBlockingHandler))
