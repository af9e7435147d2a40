from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from proxy.storage.valkey import EmbeddedValkey
from tests.support.command import environment
from tests.support.waiting import wait_until

USER = """
import sys, time
from pathlib import Path
from proxy.storage.valkey import EmbeddedValkey
store = EmbeddedValkey(Path(sys.argv[1]))
store.ensure()
print("joined", flush=True)
time.sleep(600)
"""


@contextmanager
def a_user(data_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """Start another process that starts the store, or joins it. It is killed at the end."""
    command = [sys.executable, "-c", USER, str(data_dir)]
    with subprocess.Popen(command, env=environment(data_dir), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "joined\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    opened = EmbeddedValkey(tmp_path)
    yield opened
    opened.stop()


def test_a_store_whose_only_user_was_killed_ends(tmp_path: Path, store: EmbeddedValkey) -> None:
    with a_user(tmp_path) as user:
        assert store._answers()
        user.kill()
    assert wait_until(lambda: not store._answers(), 60)


def test_a_store_with_another_user_outlives_the_one_that_started_it(tmp_path: Path, store: EmbeddedValkey) -> None:
    with a_user(tmp_path) as user:
        store.ensure()
        user.kill()
        user.wait()
    assert not wait_until(lambda: not store._answers(), 2)


def test_a_store_that_is_stopped_leaves_no_watcher(store: EmbeddedValkey) -> None:
    store.ensure()
    watcher = store._watcher
    store.stop()
    assert watcher is not None
    assert watcher.poll() is not None
