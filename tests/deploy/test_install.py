from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.test_house import ROOT

LOCK = "deploy/locks/core.txt"


class Environment:
    """Fake a virtual environment whose installers only note their calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "venv"
        self.calls = folder / "calls"
        (self.folder / "bin").mkdir(parents=True)
        self.installer("python")

    def installer(self, name: str, status: int = 0) -> None:
        program = self.folder / "bin" / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >> {self.calls}\nexit {status}\n')
        program.chmod(0o755)

    def install(self, lock: str = LOCK) -> tuple[int, list[str]]:
        """Return the exit status, and the calls of the installers."""
        self.calls.write_text("")
        command = ["sh", "deploy/install.sh", str(self.folder), lock]
        path = {"PATH": "/usr/bin:/bin"}
        done = subprocess.run(command, cwd=ROOT, env=path, capture_output=True, text=True, check=False)
        return done.returncode, self.calls.read_text().splitlines()


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


def test_uv_installs_where_there_is_one(environment: Environment) -> None:
    environment.installer("uv")
    status, calls = environment.install()
    assert (status, len(calls)) == (0, 1)
    assert calls[0].startswith("uv pip install")
    assert calls[0].endswith(f"--require-hashes --no-deps --requirement {LOCK}")


def test_pip_installs_where_uv_fails_or_is_missing(environment: Environment) -> None:
    status, calls = environment.install()
    assert (status, [call.split()[0] for call in calls]) == (0, ["python"])
    environment.installer("uv", status=1)
    status, calls = environment.install()
    assert (status, [call.split()[0] for call in calls]) == (0, ["uv", "python"])
    assert calls[1].endswith(f"--require-hashes --no-deps --requirement {LOCK}")


@pytest.mark.parametrize("missing", [LOCK, "."])
def test_an_installation_that_was_broken_off_is_done_again_from_the_start(
    environment: Environment, missing: str
) -> None:
    environment.installer("python", status=1)
    assert environment.install(missing)[0] == 1
    environment.installer("python")
    environment.installer("uv")
    assert "--reinstall" in environment.install(missing)[1][0]
    assert "--reinstall" not in environment.install(missing)[1][0]


def test_nothing_fails_where_uv_cannot_be_had(environment: Environment) -> None:
    environment.installer("python", status=1)
    status, calls = environment.install("deploy/locks/uv.txt")
    assert (status, [call.split()[0] for call in calls]) == (0, ["python"])
