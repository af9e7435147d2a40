from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxy.cli.console import require_readable

if TYPE_CHECKING:
    from proxy.settings.schema import Settings
    from proxy.storage.registry import Registry
    from router_core.validation.validation_set import ValidationSet


def finite(value: float | None) -> float | None:
    """Reject `inf` and `nan` as the value of an option: they parse as numbers, and no JSON can carry them."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"must be a finite number; got {value}")
    return value


ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="UNIROUTE_CONFIG", help="Configuration file (LiteLLM's YAML shape)."),
]

DataDirOption = Annotated[
    Path | None, typer.Option("--data-dir", help="Folder of the embedded store and of the caches.")
]

UrlOption = Annotated[
    str | None,
    typer.Option("--url", envvar="UNIROUTE_URL", help="A running server; by default http://127.0.0.1:$UNIROUTE_PORT."),
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else on stdout.")]


def read_settings(config: Path | None, **overrides: object) -> Settings:
    """Read the settings from the options, the environment and the configuration file, in this order of precedence."""
    from proxy.settings.schema import load_settings

    return load_settings(config, os.environ, overrides)


def read_validation_set(source: str) -> ValidationSet:
    """Read the `builtin` validation set, or a JSONL file.

    Raises:
        BadArgument: the file cannot be read.
        InvalidValidationSet: naming the broken line.
    """
    from router_core.validation.families.registry import builtin_validation_set
    from router_core.validation.loading import load_validation_set

    if source == "builtin":
        return builtin_validation_set()
    return load_validation_set(require_readable(Path(source), "FILE"))


@asynccontextmanager
async def open_registry(settings: Settings) -> AsyncIterator[Registry]:
    """Open the store itself, for which no server needs to run; the embedded store of a running server is joined."""
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
