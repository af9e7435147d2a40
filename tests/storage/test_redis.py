from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from proxy.settings.schema import Settings
from proxy.storage.redis import (
    MAX_CONNECTIONS,
    OPERATION_TIMEOUT_S,
    Availability,
    Store,
    StoreUnavailable,
    load_script,
)
from proxy.storage.valkey import MAX_SOCKET_PATH, EmbeddedStoreFailed, EmbeddedValkey, private_folder, socket_path

USER = """
import sys, time
from pathlib import Path
from proxy.storage.valkey import EmbeddedValkey
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


async def another_user(folder: Path) -> asyncio.subprocess.Process:
    """Start another process, with a process group of its own, that starts the server of this folder."""
    command = [sys.executable, "-c", USER, str(folder)]
    user = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, process_group=0)
    assert user.stdout is not None
    assert await user.stdout.readline() == b"up\n"
    return user


async def pid_of(store: Store) -> int:
    return int((await store.client.info("server"))["process_id"])


async def test_more_operations_than_connections_wait_for_one(tmp_path: Path) -> None:
    store = await Store.open(settings(tmp_path))

    async def count() -> int:
        async with store.operation("count") as client:
            return int(await client.incr("count"))

    counts = await asyncio.gather(*(count() for _ in range(4 * MAX_CONNECTIONS)))
    assert sorted(counts) == list(range(1, 4 * MAX_CONNECTIONS + 1))
    assert (await store.client.info("clients"))["connected_clients"] <= MAX_CONNECTIONS
    await store.close()


async def test_the_last_user_stops_the_server_whichever_process_started_it(tmp_path: Path) -> None:
    first, second = await Store.open(settings(tmp_path)), await Store.open(settings(tmp_path))
    await first.client.set("word", "kept")
    await first.close()
    assert await second.client.get("word") == "kept"
    await second.close()
    assert not EmbeddedValkey(tmp_path)._answers()


async def test_two_users_that_leave_at_once_neither_restart_the_server_nor_leave_it_running(tmp_path: Path) -> None:
    for _ in range(5):
        stores = [await Store.open(settings(tmp_path)) for _ in range(3)]
        await asyncio.gather(*(store.close() for store in stores))
        assert not server_of(stores[0])._is_alive()


async def test_a_user_that_comes_while_the_last_one_leaves_gets_a_new_server(tmp_path: Path) -> None:
    leaving = await Store.open(settings(tmp_path))
    _, coming = await asyncio.gather(leaving.close(), Store.open(settings(tmp_path)))
    assert await coming.available()
    await coming.close()


async def test_a_restart_during_close_leaves_nothing_running(tmp_path: Path) -> None:
    store = await Store.open(settings(tmp_path))
    process = server_of(store)._process
    assert process is not None
    process.kill()
    process.wait()
    restart = asyncio.create_task(store.ensure_running())
    await asyncio.sleep(0)
    restart.cancel()  # as whoever follows the store is cancelled; the thread goes on
    await store.close()
    assert not server_of(store)._is_alive()


async def test_written_data_is_there_after_the_server_stopped(tmp_path: Path) -> None:
    store = await Store.open(settings(tmp_path))
    await store.client.set("word", "kept")
    await store.close()
    store = await Store.open(settings(tmp_path))
    assert await store.client.get("word") == "kept"
    await store.close()


async def test_no_acknowledged_write_is_lost_when_every_process_is_killed(tmp_path: Path) -> None:
    store = await Store.open(settings(tmp_path))
    for number in range(50):
        await store.client.rpush("list", number)
    process = server_of(store)._process
    assert process is not None
    process.kill()
    process.wait()
    assert not await store.available()
    await store.ensure_running()
    assert await store.client.llen("list") == 50
    await store.close()


async def test_a_server_whose_users_were_all_killed_is_joined_with_its_data(tmp_path: Path) -> None:
    user = await another_user(tmp_path)
    user.kill()
    await user.wait()
    store = await Store.open(settings(tmp_path))
    assert await store.available()
    await store.close()
    assert not server_of(store)._is_alive()


async def test_no_second_server_is_started_beside_a_silent_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.storage.valkey.START_TIMEOUT_S", 0.5)
    user = await another_user(tmp_path)
    store = await Store.open(settings(tmp_path))
    pid = await pid_of(store)
    os.kill(pid, signal.SIGSTOP)
    user.kill()
    await user.wait()
    with pytest.raises(StoreUnavailable, match="does not answer"):
        await store.ensure_running()
    os.kill(pid, signal.SIGCONT)
    await store.ensure_running()
    assert await pid_of(store) == pid
    await store.close()


async def test_any_user_restarts_a_killed_server_even_if_its_parent_only_waits(tmp_path: Path) -> None:
    user = await another_user(tmp_path)
    store = await Store.open(settings(tmp_path))
    await store.client.set("word", "kept")
    os.kill(await pid_of(store), signal.SIGKILL)
    await store.ensure_running()
    assert await store.client.get("word") == "kept"
    user.kill()
    await user.wait()
    await store.close()
    assert not server_of(store)._is_alive()


async def test_a_server_that_ended_with_an_error_is_restarted(tmp_path: Path) -> None:
    store = await Store.open(settings(tmp_path))
    process = server_of(store)._process
    assert process is not None
    await store.client.config_set("save", "")
    os.kill(process.pid, signal.SIGABRT)
    process.wait()
    process.returncode = 1  # what it ends with when its disk is full
    await store.ensure_running()
    assert await store.available()
    await store.close()


async def test_ctrl_c_to_the_group_does_not_stop_the_server(tmp_path: Path) -> None:
    user = await another_user(tmp_path)
    os.killpg(user.pid, signal.SIGINT)
    await user.wait()
    store = await Store.open(settings(tmp_path))
    assert await store.available()
    await store.close()


async def test_a_long_data_directory_gets_a_short_private_socket(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    store = await Store.open(settings(folder))
    path = socket_path(folder / "valkey")
    assert len(os.fsencode(path)) <= MAX_SOCKET_PATH
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


async def test_an_unreachable_redis_is_a_clear_error_without_its_password() -> None:
    store = Store("redis://:canary-password@127.0.0.1:1/0")
    with pytest.raises(StoreUnavailable, match=r"could not store a word: Redis at redis://127\.0\.0\.1:1/0") as caught:
        async with store.operation("store a word") as client:
            await client.set("word", "lost")
    assert "canary" not in str(caught.value)
    await store.close()


async def test_a_silent_redis_costs_one_timeout_until_it_answers_again(tmp_path: Path) -> None:
    opened = await Store.open(settings(tmp_path))
    pid = await pid_of(opened)
    os.kill(pid, signal.SIGSTOP)
    assert not await opened.available()
    for _ in range(20):
        with pytest.raises(StoreUnavailable, match=r"could not store a word: Redis at .* has not answered for"):
            async with opened.operation("store a word"):
                pytest.fail("it was asked")
    os.kill(pid, signal.SIGCONT)
    await until_async(opened.available)
    await opened.close()


async def until_async(happened: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while True:
            if await happened():
                return
            await asyncio.sleep(0.01)


async def test_a_reply_that_arrives_while_the_process_is_busy_is_no_timeout(store: Store) -> None:
    async with store.operation("keep busy") as client:
        reply: Any = asyncio.ensure_future(client.ping())
        await asyncio.sleep(0.05)  # it is sent
        time.sleep(OPERATION_TIMEOUT_S)  # noqa: ASYNC251  what a process does that imports or computes
        assert await reply
    assert await store.available()


async def test_a_process_that_is_busy_while_it_connects_is_no_timeout(store: Store) -> None:
    async def count() -> int:
        async with store.operation("count") as client:
            return int(await client.incr("count"))

    counting = [asyncio.create_task(count()) for _ in range(MAX_CONNECTIONS)]
    await asyncio.sleep(0)  # they connect
    time.sleep(2 * OPERATION_TIMEOUT_S)  # noqa: ASYNC251
    assert sorted(await asyncio.gather(*counting)) == list(range(1, MAX_CONNECTIONS + 1))


async def test_an_operation_on_a_silent_redis_ends_within_its_timeout() -> None:
    async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await hung_up.wait()
        writer.close()

    hung_up = asyncio.Event()
    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    store = Store(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    with pytest.raises(StoreUnavailable, match=r"did not answer within 0\.75 s"):
        async with store.operation("reach it") as client:
            await client.get("word")
    await store.close()
    hung_up.set()
    server.close()
    await asyncio.sleep(0)  # lets the handler close its end


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_each_change_of_availability_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    availability = Availability(logging.getLogger("uniroute.test"), back="it is back")
    availability.mark_available()
    for _ in range(3):
        availability.mark_unavailable("it is away")
    availability.mark_available()
    availability.mark_unavailable("it is away again")
    assert [record.message for record in caplog.records] == ["it is away", "it is back", "it is away again"]


def test_an_outage_from_the_start_is_logged_again_after_the_interval(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    availability = Availability(logging.getLogger("uniroute.test"), known=False, clock=clock)
    for seconds in (0.0, 59.0, 2.0):
        clock.now += seconds
        availability.mark_unavailable(f"away at {clock.now:g}", log_interval_s=60.0)
    assert [record.message for record in caplog.records] == ["away at 100", "away at 161"]


async def test_polling_ends_with_the_first_answer() -> None:
    answers = iter([False, False, True])
    availability = Availability(retry_interval_s=0.0)
    availability.mark_unavailable("away")

    async def ask() -> bool:
        return next(answers)

    await availability.poll(ask)
    assert availability.available
    assert list(answers) == []


def test_a_script_is_its_constants_and_then_its_files() -> None:
    script = load_script("proxy.server", "bucket", "date", PREFIX="uniroute:", KEPT_S=60)
    assert script.startswith('local PREFIX = "uniroute:"\nlocal KEPT_S = 60\n-- Token bucket')
    assert script.index("limits_leaked") < script.index("limits_date")
