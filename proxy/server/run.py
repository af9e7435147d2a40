from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import uvicorn

from proxy.server.protocol import LimitedHTTPProtocol
from proxy.settings.model_config import SettingsError
from proxy.settings.schema import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from proxy.server.startup import Startup


_BACKLOG = 2048

_KEEP_ALIVE_S = 75  # longer than a load balancer's 60, so that it is never we who close first

LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"()": "proxy.server.log_handler.LineFormatter"}},
    "handlers": {"stderr": {"class": "proxy.server.log_handler.NonBlockingHandler", "formatter": "line"}},
    "root": {"handlers": ["stderr"], "level": "WARNING"},
    "loggers": {"uniroute": {"level": "INFO"}},
}


class AppFactory(Protocol):
    """A function at the top of a module: it is sent to worker processes by its name."""

    def __call__(self, settings: Settings, *, counts: Path | None) -> FastAPI:
        """Make the app, in the process that serves it.

        Args:
            counts: the folder in which several workers count.
        """


def listen(host: str, port: int) -> socket.socket:
    """Return a bound socket; port 0 takes a free one. Raises SettingsError where that fails."""
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
    """Return the URL by which a client on this machine calls it."""
    host, port = bound.getsockname()[:2]
    named = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  the reverse of listening
    return f"http://[{named}]:{port}" if ":" in named else f"http://{named}:{port}"


def server_config(
    settings: Settings,
    create_app: AppFactory,
    counts: Path | None = None,
    *,
    logging: dict[str, Any] | None = LOGGING,
) -> uvicorn.Config:
    """Return uvicorn's configuration. The settings travel to worker processes, secrets and all, through a pipe."""
    return uvicorn.Config(
        partial(create_app, settings, counts=counts),
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
    """uvicorn's server, with exit status 0 after a signal, and with an orderly end also after a second Ctrl-C."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.signals: dict[int, Any] = dict.fromkeys(ending_signals(), self.handle_exit)

    @property
    def app_startup(self) -> Startup | None:
        """The app's start, once the app was made."""
        found: Startup | None = self.config.loaded_app.state.startup if self.config.loaded else None
        return found

    @property
    def is_ready(self) -> bool:
        return self.app_startup is not None and self.app_startup.app_state is not None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # The handlers stay: the process ends with its server, and a second signal must not interrupt its last steps.
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


def run_until_exit(server: Server, bound: socket.socket) -> None:
    """Run the server of a process that ends with it."""
    try:
        server.run([bound])
    finally:
        gc.freeze()  # the interpreter would look through all that was imported once more before it ends: for seconds


def ending_signals() -> list[signal.Signals]:
    """Return the signals that end a process in order: not SIGHUP, of a closed terminal, where `nohup` ignores it."""
    signals = [signal.SIGINT, signal.SIGTERM]
    return signals if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [*signals, signal.SIGHUP]


def exit_on_signals() -> None:
    """End this process in order when it is told to: otherwise the embedded store would be left running."""

    def leave(*_: object) -> None:
        raise SystemExit(0)

    for number in ending_signals():
        if number != signal.SIGINT:  # which Python turns into KeyboardInterrupt
            signal.signal(number, leave)
