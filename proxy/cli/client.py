from __future__ import annotations

import json
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import httpx

from proxy.cli import console
from proxy.cli.console import BadArgument, CommandError, Progress
from proxy.settings.outbound import OutboundConnectError, http_client

POLL_INTERVAL_S = 0.3

FINISHED = frozenset({"ready", "failed", "cancelled"})

# How long an unavailable server is asked again how far a job is: the job itself goes on.
UNAVAILABLE_TIMEOUT_S = 60.0

DECISIONS_PER_PAGE = 500

Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]


class KeyRefused(CommandError):
    """The server asks for another key (401)."""


class ServerUnavailable(CommandError):
    """The server cannot answer now (503), for instance while its store is busy.

    Args:
        passing: it says when to try again.
    """

    def __init__(self, message: str, *, passing: bool) -> None:
        super().__init__(message)
        self.passing = passing


class ServerClient:
    """Call one server. Every failure becomes a CommandError with the server's own message."""

    def __init__(self, url: str, key: str | None) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.url = url.rstrip("/")
        try:
            self._http = http_client(base_url=self.url, headers=headers, timeout=60)
        except (httpx.InvalidURL, ValueError) as error:
            raise BadArgument(f"--url: {url!r} is not an address, as http://127.0.0.1:8000 ({error})") from None

    def call(self, method: Method, path: str, body: Mapping[str, Any] | None = None) -> Any:
        reply = self._request(method, path, body)
        return reply.json() if reply.content else None

    def decisions(self, query: Mapping[str, str], limit: int | None = None) -> Iterator[dict[str, Any]]:
        """Yield whole decisions, newest first, page by page. `limit`: of how many; None: of all."""
        left, cursor = limit, None
        while left is None or left > 0:
            size = DECISIONS_PER_PAGE if left is None else min(left, DECISIONS_PER_PAGE)
            asked = {**query, "format": "jsonl", "limit": str(size), **({"cursor": cursor} if cursor else {})}
            reply = self._request("GET", "/admin/decisions", query=asked)
            lines = [line for line in reply.text.split("\n") if line]
            yield from map(json.loads, lines)
            left, cursor = None if left is None else left - len(lines), reply.headers.get("x-uniroute-next")
            if cursor is None:
                return

    def report(self, query: Mapping[str, str], progress: Progress) -> dict[str, Any]:
        """Return the report of the decisions that match, and show how many are read as long as it is made."""
        while (reply := self._request("GET", "/admin/report", query=query)).status_code == 202:
            progress.update("reading", reply.json()["decisions"], 0, "decisions")
        found: dict[str, Any] = reply.json()
        return found

    def _request(
        self,
        method: Method,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        query: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        try:
            reply = self._http.request(method, path, json=body, params=query)
        except OutboundConnectError as error:
            raise CommandError(f"the server at {self.url} cannot be reached: {error}") from None
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise CommandError(
                f"no UniRoute server answers at {self.url} ({error}); start one with `uniroute serve`, or give --url"
            ) from None
        if reply.is_success:
            return reply
        message = f"{method} {path}: {reply.status_code} {_message(reply)}"
        if reply.status_code == 503:
            raise ServerUnavailable(message, passing="retry-after" in reply.headers)
        raise (KeyRefused if reply.status_code == 401 else CommandError)(message)

    def follow(self, job: str, progress: Progress) -> dict[str, Any]:
        """Show a job's progress until it has ended, and return its last state."""
        while (state := self.show_job(job, progress))["state"] not in FINISHED:
            time.sleep(POLL_INTERVAL_S)
        return state

    def show_job(self, job: str, progress: Progress) -> dict[str, Any]:
        """Show a job's progress and return its state. A server that is unavailable for a while is asked again."""
        deadline = time.monotonic() + UNAVAILABLE_TIMEOUT_S
        while True:
            try:
                state: dict[str, Any] = self.call("GET", f"/admin/jobs/{job}")
                break
            except ServerUnavailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_INTERVAL_S)
        progress.update(state["model"], state["done"], state["total"], _remark(state))
        return state

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> ServerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def admin_client(url: str | None) -> ServerClient:
    """Return a client for admin calls. Raises BadArgument without UNIROUTE_ADMIN_KEY."""
    key = os.environ.get("UNIROUTE_ADMIN_KEY")
    if not key:
        raise BadArgument("UNIROUTE_ADMIN_KEY is not set; give the key that the server was started with")
    return ServerClient(server_url(url), key)


def caller_client(url: str | None) -> ServerClient:
    """Return a client for calls that need no admin key; it sends UNIROUTE_API_KEY if that is set."""
    return ServerClient(server_url(url), os.environ.get("UNIROUTE_API_KEY"))


def server_url(url: str | None) -> str:
    port = os.environ.get("UNIROUTE_PORT", "8000")
    return url or f"http://127.0.0.1:{port if port.isdigit() else '8000'}"


def _remark(state: Mapping[str, Any]) -> str:
    parts = [f"${state['spent_usd']:.4f}"] if state["spent_usd"] else []
    parts += [f"{state[key]} {key}" for key in ("failed", "unlabelled") if state[key]]
    if state["eta_s"] is not None and state["state"] == "running":
        parts.append(f"{state['eta_s']:.0f} s left")
    return ", ".join(parts)


def _message(reply: httpx.Response) -> str:
    try:
        return str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return reply.text[:200]


STARTUP_POLL_INTERVAL_S = 0.1


@contextmanager
def announce_ready(url: str, say: console.Say = console.echo_err) -> Iterator[None]:
    """Show the progress of a server's start, and say when it is ready, from a thread that ends with this context.

    A thread that still runs when the interpreter is finalized can crash the process.
    """
    started, ended = time.monotonic(), threading.Event()

    def wait() -> None:
        if wait_until_ready(url, ended.wait, say):
            say(f"ready after {time.monotonic() - started:.1f} s; Ctrl-C ends it")

    thread = threading.Thread(target=wait, name="uniroute-announce", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(5)


def wait_until_ready(url: str, ended: Callable[[float], bool], say: console.Say = console.echo_err) -> bool:
    """Show the progress of a server's start; return True once it is ready, and False where it has ended before.

    Args:
        ended: waits for these seconds, or for the end of the server; says whether it has ended.
    """
    no_certificates = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # they take long to load, and it is plain HTTP
    with httpx.Client(verify=no_certificates, trust_env=False, timeout=1) as client, console.progress(say) as bars:
        while (document := _readiness(client, url)) is not None:
            show_startup(document, bars)
            if ended(STARTUP_POLL_INTERVAL_S):
                return False
    return True


def show_startup(document: Mapping[str, Any], bars: console.Progress) -> None:
    """Show the steps of `/readyz` whose length is known."""
    for step in document.get("under_way", ()):
        if step.get("done"):
            bars.update(step["what"], step["done"], step["total"])


def _readiness(client: httpx.Client, url: str) -> dict[str, Any] | None:
    """Return the document of `/readyz` while the server is not ready, and None once it is."""
    try:
        reply = client.get(f"{url}/readyz")
        document = reply.json()
    except (httpx.HTTPError, ValueError):
        return {}
    return None if reply.is_success else document if isinstance(document, dict) else {}
