from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import typer

from proxy.app import app_state
from proxy.cli.options import ConfigOption, DataDirOption, read_settings, run
from proxy.settings.models import ModelConfig, ModelInfo, check_model_name
from proxy.settings.schema import Settings, check_exposure, is_loopback
from proxy.storage.client_keys import AuthRequiredLatch
from proxy.storage.price_map import PriceMap
from proxy.storage.redis import Store, StoreUnavailable
from proxy.storage.registry import Registry
from proxy.storage.valkey import EmbeddedStoreFailed, EmbeddedValkey


def check_open_door(settings: Settings) -> None:
    """Refuse to listen to others while no client key exists. On loopback nothing is asked.

    Raises:
        SettingsError: the server would be open to everybody.
        StoreUnavailable: the embedded store does not start.
    """
    latch = AuthRequiredLatch(settings.data_dir)
    if not (is_loopback(settings.host) or latch.closed):
        asyncio.run(_look_for_keys(settings, latch))
        check_exposure(settings, keys_required=latch.closed)


async def _look_for_keys(settings: Settings, latch: AuthRequiredLatch) -> None:
    """A store that does not answer counts as one without keys."""
    store = await Store.open(settings)
    try:
        with contextlib.suppress(StoreUnavailable):
            if await Registry(store, (), latch).keys.listed():
                latch.close()
    finally:
        await store.close()


@contextmanager
def kept_store(settings: Settings) -> Iterator[None]:
    """Use the embedded store, if that is the one, so that it outlives workers that die. They start it themselves."""
    if settings.redis_url:
        yield
        return
    embedded = EmbeddedValkey(settings.data_dir)
    joining = threading.Thread(target=_join, args=(embedded,), name="uniroute-store")
    joining.start()
    try:
        yield
    finally:
        embedded.closing = True
        joining.join()
        embedded.stop()


def _join(embedded: EmbeddedValkey) -> None:
    with contextlib.suppress(EmbeddedStoreFailed):  # the workers find out, and say so
        embedded.ensure()


worker_log = logging.getLogger("uniroute.worker")


async def work(settings: Settings) -> None:
    """Until SIGTERM or Ctrl-C; an unfinished job is given back to the others, and a start is not finished."""
    told = asyncio.Event()
    for ending in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(ending, told.set)
    opened = asyncio.Event()
    measuring = asyncio.create_task(_measure(settings, opened, told))
    telling = asyncio.create_task(told.wait())
    await asyncio.wait({measuring, telling}, return_when=asyncio.FIRST_COMPLETED)
    telling.cancel()
    if not opened.is_set():
        measuring.cancel()
    await asyncio.wait({measuring})
    if not measuring.cancelled():
        measuring.result()


async def _measure(settings: Settings, opened: asyncio.Event, told: asyncio.Event) -> None:
    unexposed = settings.model_copy(update={"host": "127.0.0.1"})
    async with app_state(unexposed, os.environ) as services:
        opened.set()
        worker_log.info("measuring models for the store at %s", services.store.name)
        await told.wait()


detect_log = logging.getLogger("uniroute.detect")

OLLAMA_URL = "http://127.0.0.1:11434"

_OLLAMA_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Provider:
    """A provider of hosted models: the variable of its key, LiteLLM's prefix for it, and which models are offered."""

    key: str
    prefix: str
    models: tuple[str, ...]


PROVIDERS = (
    Provider("OPENAI_API_KEY", "openai/", ("gpt-6-luna", "gpt-6.1-sol")),
    Provider("ANTHROPIC_API_KEY", "anthropic/", ("claude-haiku-5-5", "claude-sonnet-5-5", "claude-opus-5-5")),
    Provider("GEMINI_API_KEY", "gemini/", ("gemini-3.5-flash-lite", "gemini-3.8-flash", "gemini-4-argon")),
    Provider("MISTRAL_API_KEY", "mistral/", ("mistral-small-2603", "mistral-large-4")),
    Provider("GROQ_API_KEY", "groq/", ("openai/gpt-oss-20b", "openai/gpt-oss-120b")),
    Provider("DEEPSEEK_API_KEY", "deepseek/", ("deepseek-v4-flash", "deepseek-v4-pro")),
    Provider("XAI_API_KEY", "xai/", ("grok-4.3", "grok-4.7")),
    Provider("CEREBRAS_API_KEY", "cerebras/", ("gpt-oss-120b", "qwen-3.8-27b")),
    Provider("TOGETHERAI_API_KEY", "together_ai/", ("zai-org/GLM-5.3-Flash", "moonshotai/Kimi-K3")),
)


def detect_models(
    environ: Mapping[str, str], catalog: PriceMap, *, ollama_url: str = OLLAMA_URL
) -> tuple[ModelConfig, ...]:
    """Hosted models whose key is set and whose price the catalog knows, then every chat model of the Ollama."""
    return (*_hosted(environ, catalog), *_ollama(ollama_url))


def with_detected(settings: Settings, found: Sequence[ModelConfig]) -> Settings:
    """The settings with the found models added; a configured name, or the same LiteLLM model, stays as configured."""
    names = {entry.model_name for entry in settings.model_list}
    models = {entry.litellm_params["model"] for entry in settings.model_list}
    new = [e for e in found if e.model_name not in names and e.litellm_params["model"] not in models]
    return settings.model_copy(update={"model_list": (*settings.model_list, *new)})


def _hosted(environ: Mapping[str, str], catalog: PriceMap) -> list[ModelConfig]:
    return [
        ModelConfig(
            model_name=provider.prefix + model,
            litellm_params={"model": provider.prefix + model, "api_key": f"os.environ/{provider.key}"},
        )
        for provider in PROVIDERS
        if environ.get(provider.key)
        for model in provider.models
        if (known := catalog.find(provider.prefix + model)) and known.price
    ]


def _ollama(url: str) -> list[ModelConfig]:
    return [
        ModelConfig(
            model_name=f"ollama/{name}",
            litellm_params={"model": f"ollama_chat/{name}", "api_base": url},
            model_info=ModelInfo(free=True),
        )
        for name in _ollama_names(url)
    ]


def _ollama_names(url: str) -> list[str]:
    """Names of the models that it holds, without embedding models; empty where nothing answers."""
    import httpx

    try:
        reply = httpx.get(f"{url}/api/tags", timeout=_OLLAMA_TIMEOUT_S, trust_env=False)
        names = [str(model["name"]) for model in reply.raise_for_status().json()["models"]]
    except httpx.ConnectError:
        return []
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        detect_log.warning("something answers at %s, but not as Ollama does: %r", url, error)
        return []
    return [name for name in names if "embed" not in name and _is_usable(name)]


def _is_usable(name: str) -> bool:
    try:
        check_model_name(f"ollama/{name}")
    except ValueError as error:
        detect_log.warning("Ollama's model %r is left out: %s", name, error)
        return False
    return True


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

    from proxy.cli import console
    from proxy.server.preflight import validate_files
    from proxy.server.run import LOGGING, address, announce_ready, leave_on_sigterm, listen, run_server

    leave_on_sigterm()
    dictConfig(LOGGING)
    settings = read_settings(config, host=host, port=port, workers=workers, data_dir=data_dir)
    if detect:
        settings = _with_detected(settings)
    validate_files(settings)
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
    from proxy.cli.demo import run_demo
    from proxy.server.run import leave_on_sigterm

    leave_on_sigterm()
    run_demo(read_settings(None, port=port, data_dir=data_dir), prompts=prompts, once=once)


def worker(config: ConfigOption = None, data_dir: DataDirOption = None) -> None:
    """Measure models for servers that use the same store, until Ctrl-C."""
    from logging.config import dictConfig

    from proxy.server.preflight import validate_files
    from proxy.server.run import LOGGING

    dictConfig(LOGGING)
    settings = read_settings(config, data_dir=data_dir)
    validate_files(settings)
    run(work(settings))


def _with_detected(settings: Settings) -> Settings:
    from proxy.cli import console
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
