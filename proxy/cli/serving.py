"""`uniroute serve`, `demo` and `worker`: the long-running commands."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from proxy.cli.options import ConfigOption, DataDirOption, read_settings, run

if TYPE_CHECKING:
    from proxy.settings.schema import Settings

HostOption = Annotated[str | None, typer.Option("--host", help="Address to listen on; 127.0.0.1 if not set.")]
PortOption = Annotated[int | None, typer.Option("--port", help="Port; 8000 if not set, 0 for a free one.")]


def serve(
    config: ConfigOption = None,
    host: HostOption = None,
    port: PortOption = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Processes that share the port.")] = None,
    data_dir: DataDirOption = None,
    *,
    detect: Annotated[
        bool, typer.Option("--detect", help="Also offer models of providers whose key is set, and of an Ollama.")
    ] = False,
) -> None:
    """Serve the OpenAI-compatible API until Ctrl-C."""
    from logging.config import dictConfig

    from proxy.app import check_files
    from proxy.cli import console
    from proxy.cli.serve_store import check_open_door
    from proxy.server.run import LOGGING, address, announce_ready, leave_on_sigterm, listen, run_server

    leave_on_sigterm()
    dictConfig(LOGGING)
    settings = read_settings(config, host=host, port=port, workers=workers, data_dir=data_dir)
    if detect:
        settings = _with_detected(settings)
    check_files(settings)
    check_open_door(settings)
    bound = listen(settings.host, settings.port)
    console.note(f"UniRoute at {address(bound)}/v1, data in {settings.data_dir}")
    tell_models(settings, os.environ)
    announce_ready(address(bound), console.note)
    run_server(settings, bound)


def demo(
    prompts: Annotated[
        int, typer.Option("--prompts", min=24, max=150, help="Questions that each model is asked.")
    ] = 30,
    port: PortOption = None,
    data_dir: DataDirOption = None,
    *,
    once: Annotated[bool, typer.Option("--once", help="End after the three prompts.")] = False,
) -> None:
    """Three real models on this machine, measured and routed. Needs no key and no network."""
    from proxy.demo.run import run_demo
    from proxy.server.run import leave_on_sigterm

    leave_on_sigterm()
    run_demo(read_settings(None, port=port, data_dir=data_dir), prompts=prompts, once=once)


def worker(config: ConfigOption = None, data_dir: DataDirOption = None) -> None:
    """Measure models for servers that use the same store, until Ctrl-C."""
    from logging.config import dictConfig

    from proxy.app import check_files
    from proxy.cli.worker import work
    from proxy.server.run import LOGGING

    dictConfig(LOGGING)
    settings = read_settings(config, data_dir=data_dir)
    check_files(settings)
    run(work(settings))


def _with_detected(settings: Settings) -> Settings:
    from proxy.cli import console
    from proxy.cli.detect import PROVIDERS, detect_models, with_detected
    from proxy.storage.price_map import bundled_catalog

    found = detect_models(os.environ, bundled_catalog())
    if not found:
        keys = ", ".join(provider.key for provider in PROVIDERS)
        console.note(f"--detect found no model: none of {keys} is set, and no Ollama answers on port 11434")
    return with_detected(settings, found)


def tell_models(settings: Settings, environ: Mapping[str, str]) -> None:
    """What is served, and what the configuration counts on that is not there."""
    from proxy.cli import console
    from proxy.settings.models import referred_variable

    for model in settings.model_list:
        console.note(f"  {model.model_name}  ({model.litellm_params['model']})")
        for value in model.litellm_params.values():
            if (name := referred_variable(value, settings.allowed_env)) and not environ.get(name):
                console.note(f"    its key is missing: the environment variable {name} is not set")
    if not settings.model_list:
        console.note("  no models are configured; add one with `uniroute models add` (needs UNIROUTE_ADMIN_KEY)")
    if settings.default_model and settings.default_model not in {m.model_name for m in settings.model_list}:
        console.note(f"  default_model: {settings.default_model!r} is not configured; it counts once it is added")
