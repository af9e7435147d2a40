from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from tests.support.program import ROOT, Process, run_program, start_program

ADMIN_KEY = "admin-key-of-the-tests"
START_S = 300.0
_ADDRESS = re.compile(r"UniRoute at (http://\S+)/v1")


def environment(data_dir: Path, embedder_cache: Path | None = None, **more: str) -> dict[str, str]:
    """Return the variables of a command. `embedder_cache`: where the distilled table is already."""
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    for table in embedder_cache.glob("static-*") if embedder_cache else ():
        if not (data_dir / table.name).exists():
            (data_dir / table.name).symlink_to(table)
    ours = {
        name: value for name, value in os.environ.items() if not name.endswith("_API_KEY") and "UNIROUTE" not in name
    }
    fixed = {"PYTHONPATH": str(ROOT), "UNIROUTE_LOG_FORMAT": "text", "COLUMNS": "120"}
    return {**ours, **fixed, "UNIROUTE_DATA_DIR": str(data_dir), **more}


def run_command(
    *arguments: str | Path, environ: Mapping[str, str], timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    return run_program("proxy.cli", *arguments, environ=environ, timeout_s=timeout_s)


class ServeCommand:
    """Run `uniroute serve` on a free port until the block ends. `log` is what it wrote."""

    def __init__(
        self,
        *arguments: str | Path,
        environ: Mapping[str, str],
        log: Path,
        descriptors: int | None = None,
        translates: bool = False,
    ) -> None:
        self.arguments = arguments
        self.environ = dict(environ)
        self.wrapper = [] if descriptors is None else ["prlimit", f"--nofile={descriptors}:{descriptors}"]
        self._translates = translates
        self._log = log
        self.process: Process | None = None
        self.url = ""

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def __enter__(self) -> ServeCommand:
        with self._log.open("wb") as output:
            self.process = start_program(
                "proxy.cli",
                *("serve", "--port", "0", *self.arguments),
                environ=self.environ,
                stdout=output,
                stderr=output,
                wrapper=self.wrapper,
                translates=self._translates,
            )
        try:
            self._wait_until_ready()
        except AssertionError:
            self.stop(signal.SIGKILL)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Stop it and return the exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(120)

    def _wait_until_ready(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + START_S
        while "ready after" not in self.log:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)
        found = _ADDRESS.search(self.log)
        assert found, self.log
        self.url = found[1]
