from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

import httpx
import pytest
import yaml

from proxy.dashboard.views import MAX_STREAM_S
from tests.dashboard.first_view import log_in
from tests.support.command import ServeCommand, environment
from tests.support.proxy_process import ADMIN_KEY


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[ServeCommand]:
    folder = tmp_path_factory.mktemp("workers")
    (folder / "config.yaml").write_text(yaml.safe_dump({"model_list": []}))
    environ = {**environment(folder, embedder_cache), "UNIROUTE_ADMIN_KEY": ADMIN_KEY}
    arguments = ("--config", folder / "config.yaml", "--workers", "2")
    with ServeCommand(*arguments, environ=environ, log=folder / "log.txt") as server:
        yield server


def test_a_session_is_known_to_every_worker_and_so_is_its_end(two_workers: ServeCommand) -> None:
    cookie = log_in(two_workers.url)

    def statuses() -> set[int]:
        # a connection of its own each: the workers share the port
        views = (httpx.get(f"{two_workers.url}/dashboard/models", headers={"cookie": cookie}) for _ in range(16))
        return {reply.status_code for reply in views}

    assert statuses() == {200}
    page = httpx.get(f"{two_workers.url}/dashboard/keys", headers={"cookie": cookie}).text
    token = page.split('name="token" value="')[1].split('"')[0]
    headers = {"cookie": cookie, "origin": two_workers.url}
    httpx.post(f"{two_workers.url}/dashboard/logout", data={"token": token}, headers=headers)
    assert statuses() == {303}


def test_streams_end_when_the_server_is_told_to(tmp_path: Path, embedder_cache: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model_list": []}))
    environ = {**environment(tmp_path, embedder_cache), "UNIROUTE_ADMIN_KEY": ADMIN_KEY}
    opened, ended = Event(), Event()

    def follow(url: str, cookie: str) -> None:
        with httpx.stream("GET", f"{url}/dashboard/now/events", headers={"cookie": cookie}, timeout=60) as reply:
            for _ in reply.iter_lines():
                opened.set()
        ended.set()

    with ServeCommand("--config", tmp_path / "config.yaml", environ=environ, log=tmp_path / "log.txt") as server:
        thread = Thread(target=follow, args=(server.url, log_in(server.url)))
        thread.start()
        assert opened.wait(60)
        assert not ended.is_set()
    # whole: one that was cut off would have raised
    assert ended.wait(MAX_STREAM_S)
    thread.join()
