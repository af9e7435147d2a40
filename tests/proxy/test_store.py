"""The embedded server: one owner, adoption after a kill, nothing acknowledged lost; and what an absent Redis says."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from proxy.settings import Settings
from proxy.state.embedded import LONGEST_SOCKET_PATH, EmbeddedStoreFailed, EmbeddedValkey, private_folder, socket_path
from proxy.state.store import Store, StoreUnavailable

OWNER = """
import sys, time
from pathlib import Path
from proxy.state.embedded import EmbeddedValkey
server = EmbeddedValkey(Path(sys.argv[1]))
server.ensure()
print("up", flush=True)
time.sleep(60)
"""


def settings(folder: Path, **more: object) -> Settings:
    return Settings.model_validate({"data_dir": folder, **more})


def server_of(store: Store) -> EmbeddedValkey:
    assert store.embedded is not None
    return store.embedded


async def an_owner(folder: Path) -> asyncio.subprocess.Process:
    """Another process, with a process group of its own, that owns the server of this folder."""
    command = [sys.executable, "-c", OWNER, str(folder)]
    owner = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, process_group=0)
    assert owner.stdout is not None
    assert await owner.stdout.readline() == b"up\n"
    return owner


async def test_the_first_process_owns_the_server_and_others_join_it(tmp_path: Path) -> None:
    owner, guest = await Store.open(settings(tmp_path)), await Store.open(settings(tmp_path))
    await owner.client.set("word", "kept")
    assert await guest.client.get("word") == "kept"
    assert server_of(owner).owned
    assert not server_of(guest).owned
    await guest.close()
    assert await owner.available()
    await owner.close()


async def test_what_was_written_is_there_after_the_owner_stopped(tmp_path: Path) -> None:
    store = await Store.open(settings(tmp_path))
    await store.client.set("word", "kept")
    await store.close()
    assert not EmbeddedValkey(tmp_path)._answers()
    store = await Store.open(settings(tmp_path))
    assert await store.client.get("word") == "kept"
    await store.close()


async def test_nothing_acknowledged_is_lost_when_every_process_is_killed(tmp_path: Path) -> None:
    store = await Store.open(settings(tmp_path))
    for number in range(50):
        await store.client.rpush("list", number)
    process = server_of(store)._process
    assert process is not None
    process.kill()
    process.wait()
    assert not await store.available()
    await store.keep_up(answering=False)
    assert await store.client.llen("list") == 50
    await store.close()


async def test_a_server_whose_owner_was_killed_is_adopted_with_its_data(tmp_path: Path) -> None:
    owner = await an_owner(tmp_path)
    guest = await Store.open(settings(tmp_path))
    await guest.client.set("word", "kept")
    owner.kill()
    await owner.wait()
    await guest.keep_up(answering=True)
    assert server_of(guest).owned
    assert await guest.client.get("word") == "kept"
    await guest.close()
    assert not server_of(guest)._answers()


async def test_a_server_that_is_alive_but_silent_is_never_joined_by_a_second_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.state.embedded.STARTING_S", 0.5)
    owner = await an_owner(tmp_path)
    guest = await Store.open(settings(tmp_path))
    pid = int((await guest.client.info("server"))["process_id"])
    os.kill(pid, signal.SIGSTOP)
    owner.kill()
    await owner.wait()
    with pytest.raises(StoreUnavailable, match="does not answer"):
        await guest.keep_up(answering=False)
    os.kill(pid, signal.SIGCONT)
    await guest.keep_up(answering=False)
    assert int((await guest.client.info("server"))["process_id"]) == pid
    await guest.close()


async def test_a_guest_starts_the_server_again_when_its_owner_has_stopped_it(tmp_path: Path) -> None:
    owner, guest = await Store.open(settings(tmp_path)), await Store.open(settings(tmp_path))
    await owner.client.set("word", "kept")
    await owner.close()
    assert not await guest.available()
    await guest.keep_up(answering=False)
    assert await guest.client.get("word") == "kept"
    await guest.close()


async def test_a_killed_server_is_started_by_whoever_needs_it_even_if_its_owner_only_waits(tmp_path: Path) -> None:
    owner = await an_owner(tmp_path)
    guest = await Store.open(settings(tmp_path))
    await guest.client.set("word", "kept")
    os.kill(int((await guest.client.info("server"))["process_id"]), signal.SIGKILL)
    await guest.keep_up(answering=False)
    assert await guest.client.get("word") == "kept"
    assert not server_of(guest).owned
    owner.kill()
    await owner.wait()
    await guest.keep_up(answering=True)
    await guest.close()
    assert not server_of(guest)._answers()


async def test_ctrl_c_to_the_group_does_not_stop_the_server(tmp_path: Path) -> None:
    owner = await an_owner(tmp_path)
    os.killpg(owner.pid, signal.SIGINT)
    await owner.wait()
    guest = await Store.open(settings(tmp_path))
    assert await guest.available()
    await guest.close()


async def test_a_long_data_directory_gets_a_short_private_socket(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    store = await Store.open(settings(folder))
    path = socket_path(folder / "valkey")
    assert len(os.fsencode(path)) <= LONGEST_SOCKET_PATH
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert await store.available()
    await store.close()
    path.parent.rmdir()


def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    open_to_all = tmp_path / "shared"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(EmbeddedStoreFailed, match="only this user"):
        private_folder(open_to_all)


async def test_an_absent_redis_is_a_clear_error_without_its_password() -> None:
    store = Store("redis://:canary-password@127.0.0.1:1/0")
    with pytest.raises(StoreUnavailable, match=r"could not store a word: Redis at redis://127\.0\.0\.1:1/0") as caught:
        async with store.asking("store a word") as client:
            await client.set("word", "lost")
    assert "canary" not in str(caught.value)
    await store.close()


async def test_a_redis_that_never_answers_is_given_up_within_its_time_limit() -> None:
    async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await hung_up.wait()
        writer.close()

    hung_up = asyncio.Event()
    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    store = Store(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    started = time.monotonic()
    assert not await store.available()
    assert time.monotonic() - started < 1.5
    await store.close()
    hung_up.set()
    server.close()
    await asyncio.sleep(0)  # lets the handler close its end
