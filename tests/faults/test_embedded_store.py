from __future__ import annotations

import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.faults.gateway import CONFIGURED, a_gateway, counted, embedded_pid
from tests.support.command import ServeCommand
from tests.support.processes import children_of
from tests.support.proxy_process import uniform_profile
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until

DISK_SIZE = "16m"


def test_nothing_acknowledged_is_lost_when_every_process_is_killed(
    tmp_path: Path, embedder_cache: Path, upstream: ScriptedUpstream
) -> None:
    with a_gateway(tmp_path, embedder_cache, upstream, "--workers", "2") as gateway:
        everyone = [embedded_pid(gateway), *children_of(gateway.server.pid), gateway.server.pid]
        assert gateway.add("added").status_code == 201
        key = gateway.create_client_key(gateway.embedded_url)
        assert gateway.put_price("added", 7e-6).status_code == 200
        gateway = replace(gateway, client_key=key)
        assert wait_until(lambda: gateway.ask().status_code == 200)
        answered = 1
        for _ in range(20):
            answered += gateway.ask().status_code == 200
        assert gateway.admin("POST", f"/models/{CONFIGURED}/profile", uniform_profile(0.45)).status_code == 200
        for pid in everyone:
            os.kill(pid, signal.SIGKILL)
        gateway.server.stop()

    with ServeCommand(*gateway.server.arguments, environ=gateway.server.environ, log=tmp_path / "again.txt") as server:
        gateway = replace(gateway, server=server)
        added = gateway.admin("GET", "/models/added").json()
        assert (added["state"], added["price"]["input_cost_per_token"]) == ("ready", 7e-6)
        assert added["profile"]["mean_error"] == pytest.approx(0.1, abs=0.01)
        configured = gateway.admin("GET", f"/models/{CONFIGURED}").json()["profile"]
        assert configured["mean_error"] == pytest.approx(0.45, abs=0.01)
        assert gateway.ask().status_code == 200
        assert replace(gateway, client_key=None).ask().status_code == 401
        with gateway.embedded_store() as client:
            assert wait_until(lambda: counted(client) == answered + 1), (counted(client), answered)


class OnSmallDisk(ServeCommand):
    """Run the server with its data directory on a file system of DISK_SIZE, in a mount namespace of its own."""

    def __init__(self, *arguments: str | Path, environ: dict[str, str], log: Path, **_: bool) -> None:
        super().__init__(*arguments, environ=environ, log=log)
        self.data_dir = Path(environ["UNIROUTE_DATA_DIR"])
        tables = [str(table.resolve()) for table in self.data_dir.glob("static-*")]
        disk = shlex.quote(str(self.data_dir))
        mounted = f"mount -t tmpfs -o size={DISK_SIZE},mode=700 none {disk} && ln -s {shlex.join(tables)} {disk}"
        self.wrapper = ["unshare", "-rm", "sh", "-c", f'{mounted} && exec "$@"', "sh"]

    @property
    def disk(self) -> Path:
        """Return the data directory as the server sees it."""
        return Path(f"/proc/{self.pid}/root{self.data_dir}")

    def fill(self) -> None:
        with (self.disk / "fill").open("wb", buffering=0) as file:
            try:
                while file.write(b"\0" * 4096):
                    pass
            except OSError:
                return


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Shorten the path: a socket's path has little room, and is seen through /proc here."""
    with tempfile.TemporaryDirectory(prefix="u-") as folder:
        yield Path(folder)


def may_mount() -> bool:
    tried = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
    return tried.returncode == 0


@pytest.mark.skipif(not may_mount(), reason="this kernel or container lets nobody mount a small file system")
def test_a_full_disk_refuses_changes_loses_none_and_recovers(
    short_path: Path, embedder_cache: Path, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.faults.gateway.ServeCommand", OnSmallDisk)
    with a_gateway(short_path, embedder_cache, upstream) as gateway:
        server = gateway.server
        assert isinstance(server, OnSmallDisk)
        with redis.Redis(unix_socket_path=f"{server.disk}/valkey/valkey.sock", decode_responses=True) as client:
            assert gateway.ask().status_code == 200
            server.fill()
            price, refused = 1e-6, False
            while not refused:
                refused = gateway.put_price(usd=price + 1e-8).status_code == 503
                price += 0 if refused else 1e-8
            assert [gateway.ask().status_code for _ in range(5)] == [200] * 5
            assert gateway.add("late").status_code == 503
            assert gateway.ready()["status"] == "ready"

            (server.disk / "fill").unlink()
            assert wait_until(lambda: gateway.ready()["store"] == "up")
            stored_price: Any = gateway.admin("GET", f"/models/{CONFIGURED}").json()["price"]
            assert stored_price["input_cost_per_token"] == pytest.approx(price)
            assert wait_until(lambda: gateway.put_price().status_code == 200)
            assert gateway.add("after").status_code == 201
            assert wait_until(lambda: counted(client) == 6), counted(client)
