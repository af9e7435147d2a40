"""Options that several commands share, and what they open. No command is defined here."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from proxy.cli.client import ServerClient
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
    from proxy.cli.client import ServerClient
    from proxy.cli.console import BadArgument

    key = os.environ.get("UNIROUTE_ADMIN_KEY")
    if not key:
        raise BadArgument("UNIROUTE_ADMIN_KEY is not set; give the key that the server was started with")
    return ServerClient(server_url(url), key)


def caller_client(url: str | None) -> ServerClient:
    """For calls that any client may make; UNIROUTE_API_KEY is sent if it is set."""
    from proxy.cli.client import ServerClient

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
    from proxy.storage.client_keys import KeyLatch
    from proxy.storage.redis import Store
    from proxy.storage.registry import Registry

    store = await Store.open(settings)
    try:
        configured = [entry.model_name for entry in settings.model_list]
        yield Registry(store, configured, KeyLatch(settings.data_dir), CLI)
    finally:
        await store.close()
