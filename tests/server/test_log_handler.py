from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from proxy.server import log_handler
from proxy.server.log_handler import JSONFormatter, LineFormatter, NonBlockingHandler, formatter_class, info
from proxy.server.metrics import Metrics
from tests.support.command import ServeCommand, environment
from tests.support.proxy_process import model_entry
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} (.*)")
KILLED = """
import logging, os, signal
from proxy.server.log_handler import NonBlockingHandler, info
log = logging.getLogger("uniroute.request")
logging.getLogger().addHandler(NonBlockingHandler())
log.setLevel("INFO")
for number in range(1000):
    info(log, f"number={number}")
os.kill(os.getpid(), signal.SIGKILL)
"""
BUFFER = 4 * 4096


class Pipe:
    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, BUFFER)

    def lines(self) -> list[str]:
        """Return the lines so far, without the times."""
        return [_untimed(line) for line in os.read(self.reader, 2**20).decode().splitlines()]

    def close(self) -> None:
        for fd in (self.reader, self.writer):
            try:
                os.close(fd)
            except OSError:
                continue


def _untimed(line: str) -> str:
    found = LINE.fullmatch(line)
    assert found, line
    return found[1]


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    opened = Pipe()
    yield opened
    opened.close()


@pytest.fixture
def log(pipe: Pipe) -> logging.Logger:
    """Set up the log as a server does, beneath a root of its own: pytest does not listen."""
    root = logging.RootLogger(logging.WARNING)
    root.addHandler(NonBlockingHandler(pipe.writer))
    logger = logging.Manager(root).getLogger("uniroute.piped")
    logger.setLevel(logging.INFO)
    return logger


def a_handler(log: logging.Logger) -> NonBlockingHandler:
    assert log.parent is not None
    (handler,) = log.parent.handlers
    assert isinstance(handler, NonBlockingHandler)
    return handler


@pytest.mark.parametrize("message", ["model=small seconds=0.1", "100 % größer", "half \ud800", ""])
def test_a_line_is_written_as_its_record_would_be(log: logging.Logger, pipe: Pipe, message: str) -> None:
    info(log, message)
    log.info(message)
    quick, recorded = pipe.lines()
    assert quick == recorded == f"INFO uniroute.piped {message}".encode("utf-8", "backslashreplace").decode()


def test_no_record_is_made_for_a_single_handler(
    log: logging.Logger, pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    monkeypatch.setattr(log, "makeRecord", lambda *facts, **more: made.append(facts))
    info(log, "quick")
    assert (made, pipe.lines()) == ([], ["INFO uniroute.piped quick"])


def test_another_handler_gets_a_record(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("uniroute.request.heard")
    log.addHandler(NonBlockingHandler())
    with caplog.at_level(logging.INFO, log.name):
        info(log, "heard")
    log.handlers.clear()
    (record,) = caplog.records
    assert (record.name, record.levelname, record.getMessage()) == ("uniroute.request.heard", "INFO", "heard")
    assert record.filename == "test_log_handler.py"


def test_each_of_two_handlers_writes_the_line(log: logging.Logger, pipe: Pipe) -> None:
    log.addHandler(NonBlockingHandler(pipe.writer))
    info(log, "twice")
    assert pipe.lines() == ["INFO uniroute.piped twice"] * 2


def test_filters_and_another_formatter_are_applied(log: logging.Logger, pipe: Pipe) -> None:
    a_handler(log).setFormatter(logging.Formatter("2026-01-31T00:00:00+0000 %(message)s!"))
    info(log, "other format")
    a_handler(log).setFormatter(LineFormatter())
    a_handler(log).addFilter(lambda record: "secret" not in record.getMessage())
    info(log, "secret")
    a_handler(log).filters.clear()
    log.addFilter(lambda record: "hidden" not in record.getMessage())
    info(log, "hidden")
    info(log, "shown")
    assert pipe.lines() == ["other format!", "INFO uniroute.piped shown"]


def test_lines_below_the_level_are_not_written(log: logging.Logger, pipe: Pipe) -> None:
    a_handler(log).setLevel(logging.WARNING)
    info(log, "handler")
    a_handler(log).setLevel(logging.NOTSET)
    log.setLevel(logging.WARNING)
    info(log, "logger")
    log.warning("at %s", "last")
    assert pipe.lines() == ["WARNING uniroute.piped at last"]


def test_arguments_that_do_not_fit_their_message_break_nothing(
    log: logging.Logger, pipe: Pipe, capsys: pytest.CaptureFixture[str]
) -> None:
    log.info("%d", "no number")
    log.info("next")
    assert pipe.lines() == ["INFO uniroute.piped next"]
    assert "Logging error" in capsys.readouterr().err


def test_a_killed_process_has_written_all_its_lines() -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED], check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL
    written = [_untimed(line) for line in killed.stderr.splitlines()]
    assert written == [f"INFO uniroute.request number={number}" for number in range(1000)]


def test_a_slow_reader_gets_every_line_without_blocking_the_writer(log: logging.Logger, pipe: Pipe) -> None:
    for number in range(1000):  # far more than the pipe holds, and nobody reads
        info(log, f"number={number} {'x' * (9000 if number == 500 else 60)}")
    assert a_handler(log)._queue
    writer = a_handler(log)._writer
    written: list[str] = []
    while len(written) < 1000:
        written += _whole_lines(pipe)
    assert [line.split()[2] for line in written] == [f"number={number}" for number in range(1000)]
    assert writer is not None
    writer.join(60)
    info(log, "after")
    assert (pipe.lines(), a_handler(log).dropped) == (["INFO uniroute.piped after"], 0)


def test_no_line_overtakes_the_queue(log: logging.Logger, pipe: Pipe) -> None:
    written: list[str] = []
    for number in range(3000):  # the reader is slower than we are, but it reads
        info(log, f"number={number}")
        if number % 100 == 0:
            written += _whole_lines(pipe)
    while len(written) < 3000:
        written += _whole_lines(pipe)
    assert [line.split()[2] for line in written] == [f"number={number}" for number in range(3000)]


def test_lines_without_room_are_dropped_counted_and_reported(
    log: logging.Logger, pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_handler, "MAX_QUEUED_BYTES", 2000)
    for number in range(300):
        info(log, f"number={number}")
    dropped, writer = a_handler(log).dropped, a_handler(log)._writer
    written = _whole_lines(pipe)
    while not written[-1].startswith("WARNING"):
        written += _whole_lines(pipe)
    assert writer is not None
    writer.join(60)
    assert written[-1] == f"WARNING uniroute {dropped} log lines were dropped: standard error was not read"
    assert [line.split()[2] for line in written[:-1]] == [f"number={number}" for number in range(300 - dropped)]
    assert dropped > 0


def test_lines_without_a_reader_are_counted_as_dropped(
    log: logging.Logger, pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.close(pipe.reader)
    info(log, "nobody")
    log.info("reads")
    assert a_handler(log).dropped == 2
    monkeypatch.setattr(logging.getLogger(), "handlers", [a_handler(log)])
    assert b"uniroute_log_lines_dropped_total 2.0" in Metrics().expose()


def _whole_lines(pipe: Pipe) -> list[str]:
    """Read whole lines, at least one."""
    data = os.read(pipe.reader, 2**16)
    while not data.endswith(b"\n"):
        data += os.read(pipe.reader, 2**16)
    return [_untimed(line) for line in data.decode().splitlines()]


class Answered:
    """An event, as the log line of a request is one."""

    def __str__(self) -> str:
        return "model=small cost_usd=?"

    def fields(self) -> dict[str, object]:
        return {"model": "small", "cost_usd": None}


@pytest.fixture
def json_log(log: logging.Logger) -> logging.Logger:
    a_handler(log).setFormatter(JSONFormatter())
    return log


def documents(pipe: Pipe) -> list[dict[str, Any]]:
    return [json.loads(line) for line in os.read(pipe.reader, 2**20).splitlines()]


def test_an_event_is_text_or_members_of_json(log: logging.Logger, pipe: Pipe) -> None:
    info(log, Answered())
    log.info(Answered())
    assert pipe.lines() == ["INFO uniroute.piped model=small cost_usd=?"] * 2
    a_handler(log).setFormatter(JSONFormatter())
    info(log, Answered())
    log.info(Answered())
    quick, recorded = documents(pipe)
    times = [quick.pop("time"), recorded.pop("time")]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time) for time in times)
    expected = {"level": "INFO", "logger": "uniroute.piped", "message": "piped", "model": "small", "cost_usd": None}
    assert quick == recorded == expected


def test_fields_of_a_record_are_members_of_its_json(json_log: logging.Logger, pipe: Pipe) -> None:
    json_log.warning("passed over: %s", "timeout", extra={"fields": {"model": "small"}})
    (document,) = documents(pipe)
    assert (document["level"], document["message"], document["model"]) == ("WARNING", "passed over: timeout", "small")


def test_a_traceback_stays_within_its_line_of_json(json_log: logging.Logger, pipe: Pipe) -> None:
    try:
        raise ValueError("no\nnumber")
    except ValueError:
        json_log.exception("failed")
    (document,) = documents(pipe)
    assert document["message"] == "failed"
    assert document["exception"].startswith("Traceback")
    assert document["exception"].endswith("ValueError: no\nnumber")


@pytest.mark.parametrize("text", ["\x1b[31m", "a\nb", "\x9b31m", "half \ud800", "\u2028", "größer 好"])
def test_no_text_ends_a_line_of_json_or_reaches_a_terminal(json_log: logging.Logger, pipe: Pipe, text: str) -> None:
    info(json_log, text)
    line = os.read(pipe.reader, 2**20).decode()
    assert line.endswith("\n")
    assert line[:-1].isprintable()
    assert json.loads(line)["message"] == text


def test_lines_are_json_unless_a_terminal_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "isatty", lambda fd: False)
    assert [formatter_class(each) for each in ("auto", "json", "text")] == [JSONFormatter, JSONFormatter, LineFormatter]
    monkeypatch.setattr(os, "isatty", lambda fd: fd == 2)
    assert [formatter_class(each) for each in ("auto", "json", "text")] == [LineFormatter, JSONFormatter, LineFormatter]


def test_a_server_without_a_terminal_logs_json_alone(tmp_path: Path, embedder_cache: Path) -> None:
    with ScriptedUpstream() as upstream:
        config = {
            "model_list": [model_entry("small", upstream.url)],
            "uniroute": {"profile": {"on_start": False}},
        }
        (tmp_path / "config.yaml").write_text(json.dumps(config))
        environ = environment(tmp_path / "data", embedder_cache, MODEL_API_KEY="x", UNIROUTE_LOG_FORMAT="auto")
        log = tmp_path / "log.txt"
        with ServeCommand("--config", tmp_path / "config.yaml", environ=environ, log=log) as server:
            body = {"model": "small", "messages": [{"role": "user", "content": "hi"}]}
            reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
            httpx.get(f"{server.url}/v1/unknown", timeout=60)
            decision = reply.headers["x-uniroute-decision"]
            assert wait_until(lambda: decision in server.log)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    (line,) = [each for each in lines if each.get("decision") == decision]
    assert (line["logger"], line["message"], line["model"]) == ("uniroute.request", "request", "small")
    assert (line["ending"], line["key"], line["prompt_tokens"]) == ("complete", None, 4)
    assert line["cost_usd"] > 0
    assert [each["status"] for each in lines if each["logger"] == "uniroute.edge"] == [404]
    assert any(each["message"].startswith("ready after") for each in lines)
