"""Starts the server: its socket, the store that it owns, its processes. What is served is app's."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import uvicorn

from proxy.connection import ClientConnection
from proxy.descriptors import raise_limit
from proxy.settings import Settings, SettingsError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_BACKLOG = 2048
_KEEP_ALIVE_S = 75  # longer than a load balancer's 60, so that it is never we who close first
LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"()": "proxy.log_lines.LineFormatter"}},
    "handlers": {"stderr": {"class": "proxy.log_lines.LineHandler", "formatter": "line"}},
    "root": {"handlers": ["stderr"], "level": "WARNING"},
    "loggers": {"uniroute": {"level": "INFO"}},
}


@dataclass(frozen=True)
class AppFactory:
    """Makes the app in the process that serves it; travels to worker processes, secrets and all, through a pipe."""

    settings: Settings
    parent: int

    def __call__(self) -> ASGIApp:
        from proxy.app import from_settings
        from proxy.cli.startup import PlainStart
        from proxy.jobs.onboarding import measuring_on_start

        if os.getpid() != self.parent:
            _end_with(self.parent)
        return PlainStart(measuring_on_start(from_settings(self.settings)))


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises SettingsError when it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise SettingsError(
            f"port: cannot listen on {host}:{port} ({error.strerror}); choose another with --port"
        ) from None
    bound.set_inheritable(True)
    return bound


def address(bound: socket.socket) -> str:
    """http://… as a client on this machine would call it."""
    host, port = bound.getsockname()[:2]
    named = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  the reverse of listening
    return f"http://[{named}]:{port}" if ":" in named else f"http://{named}:{port}"


def server_config(settings: Settings, *, logging: dict[str, Any] | None = LOGGING) -> uvicorn.Config:
    return uvicorn.Config(
        AppFactory(settings, os.getpid()),
        factory=True,
        loop="uvloop" if os.name == "posix" else "auto",
        http=ClientConnection,
        ws="none",
        lifespan="on",
        workers=settings.workers,
        log_config=logging,
        log_level=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=settings.drain_s,
    )


def run_server(settings: Settings, bound: socket.socket) -> bool:
    """Serve until SIGTERM or Ctrl-C, then let requests finish. Whether it ever served."""
    raise_limit()
    config = server_config(settings)
    if settings.workers > 1:
        return _run_workers(config, bound)
    server = uvicorn.Server(config)
    try:
        server.run([bound])
    except KeyboardInterrupt:
        pass  # uvicorn raises again, at the end, the signal that ended it
    except SystemExit as ended:
        if ended.code != uvicorn.config.STARTUP_FAILURE:
            raise
    return server.started


def leave_on_sigterm() -> None:
    """Make SIGTERM an orderly end: without it the embedded store would be left running."""

    def leave(*_: object) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, leave)


def _run_workers(config: uvicorn.Config, bound: socket.socket) -> bool:
    from uvicorn.supervisors import Multiprocess

    workers = Multiprocess(config, [bound])
    workers.run()
    return all(process.exitcode != uvicorn.config.STARTUP_FAILURE for process in workers.processes)


class BackgroundServer:
    """A server in a thread of this process, for the demo. It is gone when the process is."""

    def __init__(self, settings: Settings, bound: socket.socket, logging: dict[str, Any]) -> None:
        self._server = uvicorn.Server(server_config(settings, logging=logging))
        self._drain_s = settings.drain_s
        self._bound = bound
        self._ended = threading.Event()  # a join() that Ctrl-C interrupts would count the thread as ended
        self._thread = threading.Thread(target=self._run, name="uniroute-server", daemon=True)

    def start(self, timeout_s: float = 120) -> bool:
        """Whether it serves; False when starting failed."""
        self._thread.start()
        deadline = time.monotonic() + timeout_s
        while not self._ended.is_set() and not self._server.started and time.monotonic() < deadline:
            time.sleep(0.02)
        return self._server.started

    def wait(self) -> None:
        """Until it has ended by itself."""
        while not self._ended.wait(0.5):
            pass

    def stop(self) -> None:
        self._server.should_exit = True
        self._ended.wait(self._drain_s + 10)

    def _run(self) -> None:
        try:
            self._server.run([self._bound])
        finally:
            self._ended.set()


def announce_ready(url: str, announce: Callable[[str], None]) -> None:
    """Say when the server answers, in a thread that ends then."""
    started = time.monotonic()

    def wait() -> None:
        with httpx.Client(trust_env=False, timeout=5) as client:
            while not _is_ready(client, url):
                time.sleep(0.1)
        announce(f"ready after {time.monotonic() - started:.1f} s; Ctrl-C ends it")

    threading.Thread(target=wait, name="uniroute-announce", daemon=True).start()


def _is_ready(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(f"{url}/readyz").is_success
    except httpx.HTTPError:
        return False


def _end_with(parent: int) -> None:
    """A worker whose parent was killed ends too, or it would keep the port for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="uniroute-parent-watch", daemon=True).start()
