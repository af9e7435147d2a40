from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from proxy.cli import console
from proxy.cli.console import ConfigOption, DataDirOption, read_settings

if TYPE_CHECKING:
    from proxy.server.log_handler import LogFormat
    from proxy.settings.model_config import ModelConfig
    from proxy.settings.schema import Settings
    from proxy.storage.client_keys import AuthRequiredLatch
    from proxy.storage.price_map import PriceMap


serve_log = logging.getLogger("uniroute.serve")

worker_log = logging.getLogger("uniroute.worker")

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
    fd: Annotated[
        int | None, typer.Option("--fd", min=0, help="Descriptor of a bound socket to serve on, in place of a port.")
    ] = None,
    end_with_stdin: Annotated[
        bool, typer.Option("--end-with-stdin", help="Also end when standard input does, as with the death of a parent.")
    ] = False,
) -> None:
    """Serve the OpenAI-compatible API until Ctrl-C."""
    from logging.config import dictConfig

    from proxy.cli.client import announce_ready
    from proxy.server.log_handler import is_json
    from proxy.server.run import address, exit_on_signals, inherited_socket, listen, logging_config, run_server
    from proxy.server.startup import validate_files
    from proxy.settings.model_config import SettingsError

    exit_on_signals()
    if end_with_stdin:
        threading.Thread(target=_end_with_stdin, name="uniroute-stdin", daemon=True).start()
    dictConfig(logging_config(_log_format(os.environ)))
    given = None if fd is None else inherited_socket(fd)
    if given is not None:
        host, port = given.getsockname()[:2]
    settings = read_settings(config, host=host, port=port, workers=workers, data_dir=data_dir)
    dictConfig(logging_config(settings.log_format))
    # A log of JSON has no other lines among it.
    say = serve_log.info if is_json(settings.log_format) else console.echo_err
    if detect:
        settings = _detect(settings)
    validate_files(settings)
    check_client_keys(settings)
    try:
        bound = given or listen(settings.host, settings.port)
    except SettingsError as error:
        raise settings.refusal(str(error)) from None
    say(f"UniRoute at {address(bound)}/v1, data in {settings.data_dir}")
    print_models(settings, os.environ, say)
    with announce_ready(address(bound), say):
        run_server(settings, bound)


def demo(
    prompts: Annotated[int, typer.Option("--prompts", min=24, max=90, help="Questions that each model is asked.")] = 24,
    port: PortOption = None,
    data_dir: DataDirOption = None,
    *,
    once: Annotated[bool, typer.Option("--once", help="End after the three questions.")] = False,
) -> None:
    """Measure and route between real models on this machine. Needs no key and no network."""
    from proxy.cli.demo import run_demo
    from proxy.server.run import exit_on_signals

    exit_on_signals()
    run_demo(read_settings(None, port=port, data_dir=data_dir), prompts=prompts, once=once)


def worker(config: ConfigOption = None, data_dir: DataDirOption = None) -> None:
    """Measure models for servers that use the same store, until Ctrl-C."""
    from logging.config import dictConfig

    from proxy.server.run import logging_config
    from proxy.server.startup import validate_files

    dictConfig(logging_config(_log_format(os.environ)))
    settings = read_settings(config, data_dir=data_dir)
    dictConfig(logging_config(settings.log_format))
    validate_files(settings)
    asyncio.run(run_worker(settings))


def _end_with_stdin() -> None:
    """End this process in order once nobody can write to its standard input any more."""
    # Not through sys.stdin: a thread that waits in its lock breaks off the end of the interpreter.
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _detect(settings: Settings) -> Settings:
    from proxy.storage.price_map import bundled_price_map

    found = detect_models(os.environ, bundled_price_map())
    if not found:
        keys = ", ".join(provider.key for provider in PROVIDERS)
        console.echo_err(f"--detect found no model: none of {keys} is set, and no Ollama answers on port 11434")
    return with_detected(settings, found)


def _log_format(environ: Mapping[str, str]) -> LogFormat:
    """Return the format of what is logged before the settings are read."""
    stated = environ.get("UNIROUTE_LOG_FORMAT")
    return "json" if stated == "json" else "text" if stated == "text" else "auto"


def print_models(settings: Settings, environ: Mapping[str, str], say: console.Say = console.echo_err) -> None:
    """Print the configured models, and what the configuration refers to that is missing."""
    from proxy.settings.model_config import referred_variable

    for model in settings.model_list:
        say(f"  {model.model_name}  ({model.litellm_params['model']})")
        for value in model.litellm_params.values():
            if (name := referred_variable(value, settings.allowed_env)) and not environ.get(name):
                say(f"    its key is missing: the environment variable {name} is not set")
    if not settings.model_list:
        say("  no models are configured; add one with `uniroute models add` (needs UNIROUTE_ADMIN_KEY)")
    if settings.default_model and settings.default_model not in {m.model_name for m in settings.model_list}:
        say(f"  default_model: {settings.default_model!r} is not configured; it counts once it is added")


def check_client_keys(settings: Settings) -> None:
    """Refuse to listen beyond loopback while no client key exists.

    Raises:
        SettingsError: anybody could use the server.
        StoreUnavailable: the embedded store does not start.
    """
    from proxy.settings.schema import check_exposure, is_loopback
    from proxy.storage.client_keys import AuthRequiredLatch

    latch = AuthRequiredLatch(settings.data_dir)
    if not (is_loopback(settings.host) or latch.closed):
        asyncio.run(_look_for_keys(settings, latch))
        check_exposure(settings, keys_required=latch.closed)


async def _look_for_keys(settings: Settings, latch: AuthRequiredLatch) -> None:
    """Close the latch if the store has a key. A store that does not answer counts as one without keys."""
    from proxy.storage.redis import Store, StoreUnavailable
    from proxy.storage.registry import Registry

    store = await Store.open(settings)
    try:
        with suppress(StoreUnavailable):
            if await Registry(store, (), latch).keys.listed():
                latch.close()
    finally:
        await store.close()


async def run_worker(settings: Settings) -> None:
    """Measure models until a signal ends it. A start is broken off then, and an unfinished job is given back."""
    from proxy.server.run import ending_signals

    ending, opened = asyncio.Event(), asyncio.Event()
    for number in ending_signals():
        asyncio.get_running_loop().add_signal_handler(number, ending.set)
    work = asyncio.create_task(_measure_models(settings, opened, ending))
    signalled = asyncio.create_task(ending.wait())
    await asyncio.wait({work, signalled}, return_when=asyncio.FIRST_COMPLETED)
    signalled.cancel()
    if not opened.is_set():
        work.cancel()
    await asyncio.wait({work})
    if not work.cancelled():
        work.result()


async def _measure_models(settings: Settings, opened: asyncio.Event, ending: asyncio.Event) -> None:
    from proxy.app import app_state

    unexposed = settings.model_copy(update={"host": "127.0.0.1"})
    async with app_state(unexposed, os.environ) as services:
        opened.set()
        worker_log.info("measuring models for the store at %s", services.store.name)
        await ending.wait()


detection_log = logging.getLogger("uniroute.detect")

OLLAMA_URL = "http://127.0.0.1:11434"

_OLLAMA_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Provider:
    """A provider of hosted models: the variable of its key, its prefix in LiteLLM, and the models to offer."""

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
    environ: Mapping[str, str], price_map: PriceMap, *, ollama_url: str = OLLAMA_URL
) -> tuple[ModelConfig, ...]:
    """Find hosted models whose key is set and whose price is known, and every chat model of a running Ollama."""
    return (*_hosted(environ, price_map), *_ollama(ollama_url))


def with_detected(settings: Settings, found: Sequence[ModelConfig]) -> Settings:
    """Add the found models to the settings; a configured name, or the same LiteLLM model, stays as configured."""
    names = {entry.model_name for entry in settings.model_list}
    models = {entry.litellm_params["model"] for entry in settings.model_list}
    new = [e for e in found if e.model_name not in names and e.litellm_params["model"] not in models]
    return settings.model_copy(update={"model_list": (*settings.model_list, *new)})


def _hosted(environ: Mapping[str, str], price_map: PriceMap) -> list[ModelConfig]:
    from proxy.settings.model_config import ModelConfig

    return [
        ModelConfig(
            model_name=provider.prefix + model,
            litellm_params={"model": provider.prefix + model, "api_key": f"os.environ/{provider.key}"},
        )
        for provider in PROVIDERS
        if environ.get(provider.key)
        for model in provider.models
        if (known := price_map.find(provider.prefix + model)) and known.price
    ]


def _ollama(url: str) -> list[ModelConfig]:
    from proxy.settings.model_config import ModelConfig, ModelInfo

    return [
        ModelConfig(
            model_name=f"ollama/{name}",
            litellm_params={"model": f"ollama_chat/{name}", "api_base": url},
            model_info=ModelInfo(free=True),
        )
        for name in _ollama_names(url)
    ]


def _ollama_names(url: str) -> list[str]:
    """Ask an Ollama for its models without those that embed; return nothing where nothing answers."""
    import httpx

    try:
        reply = httpx.get(f"{url}/api/tags", timeout=_OLLAMA_TIMEOUT_S, trust_env=False)
        names = [str(model["name"]) for model in reply.raise_for_status().json()["models"]]
    except httpx.ConnectError:
        return []
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        detection_log.warning("something answers at %s, but not as Ollama does: %r", url, error)
        return []
    return [name for name in names if "embed" not in name and _is_usable(name)]


def _is_usable(name: str) -> bool:
    from proxy.settings.model_config import check_model_name

    try:
        check_model_name(f"ollama/{name}")
    except ValueError as error:
        detection_log.warning("Ollama's model %r is left out: %s", name, error)
        return False
    return True
