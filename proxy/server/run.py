from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import httpx
import uvicorn

from proxy.cli import console
from proxy.concurrency import raise_open_files_limit
from proxy.server.protocol import LimitedHTTPProtocol
from proxy.settings.models import SettingsError
from proxy.settings.schema import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from proxy.server.dependencies import ServicesHolder


_BACKLOG = 2048

_KEEP_ALIVE_S = 75  # longer than a load balancer's 60, so that it is never we who close first

_POLL_INTERVAL_S = 0.1

LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"()": "proxy.server.log_handler.LineFormatter"}},
    "handlers": {"stderr": {"class": "proxy.server.log_handler.NonBlockingHandler", "formatter": "line"}},
    "root": {"handlers": ["stderr"], "level": "WARNING"},
    "loggers": {"uniroute": {"level": "INFO"}},
}


@dataclass(frozen=True)
class AppFactory:
    """Makes the app in the process that serves it; travels to worker processes, secrets and all, through a pipe."""

    settings: Settings
    counts: Path | None = None

    def __call__(self) -> FastAPI:
        from proxy.app import from_settings

        return from_settings(self.settings, counts=self.counts)


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


def server_config(
    settings: Settings, counts: Path | None = None, *, logging: dict[str, Any] | None = LOGGING
) -> uvicorn.Config:
    """`counts`: the folder in which several workers count."""
    return uvicorn.Config(
        AppFactory(settings, counts),
        factory=True,
        loop="uvloop" if os.name == "posix" else "auto",
        http=LimitedHTTPProtocol,
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


class Server(uvicorn.Server):
    """uvicorn's, which a signal ends with status 0, and which a second Ctrl-C does not keep from closing."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.signals = {signal.SIGINT: self.handle_exit, signal.SIGTERM: self.handle_exit}

    @property
    def holder(self) -> ServicesHolder | None:
        """Of the app, once it was made."""
        found: ServicesHolder | None = self.config.loaded_app.state.holder if self.config.loaded else None
        return found

    @property
    def is_ready(self) -> bool:
        return self.holder is not None and self.holder.is_open

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # They stay: the process ends with its server, and a signal that is repeated must not break off its last steps.
        for number, handler in self.signals.items():
            signal.signal(number, handler)
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  the shape of signal handlers
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn would leave the store and the journals as they are
            for task in self.server_state.tasks:
                task.cancel()
            await self.lifespan.shutdown()


def run_server(settings: Settings, bound: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C, then let requests finish.

    Raises:
        SystemExit: the server did not start; the log says why.
    """
    raise_open_files_limit()
    if settings.workers > 1:
        from proxy.server.supervisor import Supervisor

        Supervisor(settings, partial(server_config, settings), bound).run()
        return
    try:
        run_to_the_end(Server(server_config(settings)), bound)
    except SystemExit:
        raise SystemExit(1) from None


def run_to_the_end(server: Server, bound: socket.socket) -> None:
    """Run the server of a process that ends with it."""
    try:
        server.run([bound])
    finally:
        gc.freeze()  # the interpreter would look through all that was imported once more before it ends: for seconds


def leave_on_sigterm() -> None:
    """Make SIGTERM an orderly end: without it the embedded store would be left running."""

    def leave(*_: object) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, leave)


class BackgroundServer:
    """A server in a thread of this process, for the demo. It is gone when the process is."""

    def __init__(self, settings: Settings, bound: socket.socket, logging: dict[str, Any]) -> None:
        self._server = Server(server_config(settings, logging=logging))
        self._drain_s = settings.drain_s
        self._bound = bound
        self._ended = threading.Event()  # a join() that Ctrl-C interrupts would count the thread as ended
        self._thread = threading.Thread(target=self._run, name="uniroute-server", daemon=True)

    def start(self) -> bool:
        """Whether it is ready; False when starting failed."""
        self._thread.start()
        with console.progress() as bars:
            while not self._server.is_ready and not self._ended.wait(_POLL_INTERVAL_S):
                if self._server.holder is not None:
                    show(self._server.holder.startup.to_json(), bars)
        return self._server.is_ready and not self._ended.is_set()

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
    """Show how far the start is, and say when the server is ready, in a thread that ends then."""
    started = time.monotonic()

    def wait() -> None:
        with httpx.Client(trust_env=False, timeout=5) as client, console.progress() as bars:
            while (document := _unready(client, url)) is not None:
                show(document, bars)
                time.sleep(_POLL_INTERVAL_S)
        announce(f"ready after {time.monotonic() - started:.1f} s; Ctrl-C ends it")

    threading.Thread(target=wait, name="uniroute-announce", daemon=True).start()


def show(document: dict[str, Any], bars: console.Progress) -> None:
    """What /readyz says of steps that are known to take long."""
    for step in document.get("under_way", ()):
        if step.get("done"):
            bars.update(step["what"], step["done"], step["total"])


def _unready(client: httpx.Client, url: str) -> dict[str, Any] | None:
    """What /readyz says while the server is not ready; None once it is."""
    try:
        reply = client.get(f"{url}/readyz")
        document = reply.json()
    except (httpx.HTTPError, ValueError):
        return {}
    return None if reply.is_success else document if isinstance(document, dict) else {}
