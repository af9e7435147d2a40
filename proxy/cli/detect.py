from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx

from proxy.settings.models import ModelConfig, ModelInfo, check_model_name
from proxy.settings.schema import Settings
from proxy.storage.price_map import PriceMap

log = logging.getLogger("uniroute.detect")

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
    environ: Mapping[str, str], catalog: PriceMap, *, ollama_url: str = OLLAMA_URL
) -> tuple[ModelConfig, ...]:
    """Find hosted models whose key is set and whose price is known, and every chat model of a running Ollama."""
    return (*_hosted(environ, catalog), *_ollama(ollama_url))


def with_detected(settings: Settings, found: Sequence[ModelConfig]) -> Settings:
    """Add the found models to the settings; a configured name, or the same LiteLLM model, stays as configured."""
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
    """Ask an Ollama for its models without those that embed; return nothing where nothing answers."""

    try:
        reply = httpx.get(f"{url}/api/tags", timeout=_OLLAMA_TIMEOUT_S, trust_env=False)
        names = [str(model["name"]) for model in reply.raise_for_status().json()["models"]]
    except httpx.ConnectError:
        return []
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        log.warning("something answers at %s, but not as Ollama does: %r", url, error)
        return []
    return [name for name in names if "embed" not in name and _is_usable(name)]


def _is_usable(name: str) -> bool:
    try:
        check_model_name(f"ollama/{name}")
    except ValueError as error:
        log.warning("Ollama's model %r is left out: %s", name, error)
        return False
    return True
