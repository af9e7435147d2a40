from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from proxy.storage.client_keys import AuthRequiredLatch
from proxy.storage.private_files import NotPrivate, private_folder
from proxy.storage.valkey import EmbeddedValkey


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_folder_is_made_for_this_user_alone(tmp_path: Path) -> None:
    private_folder(tmp_path / "made" / "data")
    assert mode(tmp_path / "made" / "data") == 0o700


@pytest.mark.parametrize("open_to", [0o755, 0o770, 0o701])
def test_a_folder_open_to_others_is_closed_and_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, open_to: int
) -> None:
    caplog.set_level("INFO")
    tmp_path.chmod(open_to)
    for _ in range(2):
        private_folder(tmp_path)
    assert mode(tmp_path) & 0o077 == 0
    assert caplog.messages == [f"{tmp_path} was open to other users (mode {open_to:o}) and is closed to them"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user for a while")
def test_an_open_folder_of_another_user_is_refused() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        os.seteuid(12345)
        try:
            with pytest.raises(NotPrivate, match="belongs to another user"):
                private_folder(Path(folder))
        finally:
            os.seteuid(0)


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotPrivate, match="cannot use"):
        private_folder(tmp_path / "file" / "data")


def test_every_file_of_the_store_is_for_this_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "valkey" / "appendonlydir").mkdir(parents=True, mode=0o755)
        (tmp_path / "data" / "valkey").chmod(0o755)
        (tmp_path / "data" / "valkey" / "left.rdb").write_text("")
        store = EmbeddedValkey(tmp_path / "data")
        store.ensure()
        AuthRequiredLatch(tmp_path / "data").close()
    finally:
        os.umask(before)
    try:
        found = [tmp_path / "data", *(tmp_path / "data").rglob("*")]
        assert {path.name: oct(mode(path)) for path in found if mode(path) & 0o077} == {}
        assert {"valkey.sock", "valkey.log", "left.rdb"} <= {path.name for path in found}
    finally:
        store.stop()
