from __future__ import annotations

import math
import os
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import httpx
import typer

from proxy.cli.console import BadArgument, CommandError, Progress
from proxy.settings.outbound import OutboundConnectError, http_client

if TYPE_CHECKING:
    from proxy.settings.schema import Settings
    from proxy.storage.registry import Registry


T = TypeVar("T")


def finite(value: float | None) -> float | None:
    """For options that are numbers: `inf` and `nan` parse as such, and no JSON can carry them."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"must be a finite number; got {value}")
    return value


ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="UNIROUTE_CONFIG", help="Configuration file (LiteLLM's YAML shape)."),
]

DataDirOption = Annotated[Path | None, typer.Option("--data-dir", help="Where the embedded store and caches live.")]

UrlOption = Annotated[
    str | None,
    typer.Option("--url", envvar="UNIROUTE_URL", help="A running server; by default http://127.0.0.1:$UNIROUTE_PORT."),
]

JsonOption = Annotated[bool, typer.Option("--json", help="Machine output, alone on stdout.")]


def read_settings(config: Path | None, **overrides: object) -> Settings:
    from proxy.settings.schema import load_settings

    return load_settings(config, os.environ, overrides)


def admin_client(url: str | None) -> ServerClient:
    """For admin calls; BadArgument without UNIROUTE_ADMIN_KEY."""
    from proxy.cli.console import BadArgument

    key = os.environ.get("UNIROUTE_ADMIN_KEY")
    if not key:
        raise BadArgument("UNIROUTE_ADMIN_KEY is not set; give the key that the server was started with")
    return ServerClient(server_url(url), key)


def caller_client(url: str | None) -> ServerClient:
    """For calls that any client may make; UNIROUTE_API_KEY is sent if it is set."""

    return ServerClient(server_url(url), os.environ.get("UNIROUTE_API_KEY"))


def server_url(url: str | None) -> str:
    port = os.environ.get("UNIROUTE_PORT", "8000")
    return url or f"http://127.0.0.1:{port if port.isdigit() else '8000'}"


def run(work: Coroutine[Any, Any, T]) -> T:
    import asyncio

    return asyncio.run(work)


@asynccontextmanager
async def open_registry(settings: Settings) -> AsyncIterator[Registry]:
    """The store itself, with no server needed; a running server's embedded store is joined."""
    from proxy.storage.audit_log import CLI
    from proxy.storage.client_keys import AuthRequiredLatch
    from proxy.storage.redis import Store
    from proxy.storage.registry import Registry

    store = await Store.open(settings)
    try:
        configured = [entry.model_name for entry in settings.model_list]
        yield Registry(store, configured, AuthRequiredLatch(settings.data_dir), CLI)
    finally:
        await store.close()


_POLL_S = 0.3

Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]

FINISHED = frozenset({"ready", "failed", "cancelled"})


class ServerClient:
    """One server. Every failure becomes a CommandError with the server's own words."""

    def __init__(self, url: str, key: str | None) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.url = url.rstrip("/")
        try:
            self._http = http_client(base_url=self.url, headers=headers, timeout=60)
        except (httpx.InvalidURL, ValueError) as error:
            raise BadArgument(f"--url: {url!r} is not an address, as http://127.0.0.1:8000 ({error})") from None

    def call(self, method: Method, path: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            reply = self._http.request(method, path, json=body)
        except OutboundConnectError as error:
            raise CommandError(f"the server at {self.url} cannot be reached: {error}") from None
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise CommandError(
                f"no UniRoute server answers at {self.url} ({error}); start one with `uniroute serve`, or give --url"
            ) from None
        if reply.is_success:
            return reply.json() if reply.content else None
        raise CommandError(f"{method} {path}: {reply.status_code} {_message(reply)}")

    def follow(self, job: str, progress: Progress) -> dict[str, Any]:
        """Show a job's progress until it has ended; returns its last state."""
        while (state := self.show_job(job, progress))["state"] not in FINISHED:
            time.sleep(_POLL_S)
        return state

    def show_job(self, job: str, progress: Progress) -> dict[str, Any]:
        state: dict[str, Any] = self.call("GET", f"/admin/jobs/{job}")
        progress.update(state["model"], state["done"], state["total"], _remark(state))
        return state

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> ServerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
