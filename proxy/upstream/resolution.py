"""Which way a model is reached, by its parameters: what is plain without litellm, and what it makes of the rest."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any

from proxy.safety.redaction import bare_address
from proxy.settings.models import Forward
from proxy.storage.models import Resolved
from proxy.upstream.call import STRAYING, VERBATIM, is_openais, is_provider_param
from proxy.upstream.origins import DEFAULT_BASES, address_of, is_own_address
from proxy.words import words

SPEAKERS = VERBATIM | words("azure deepseek fireworks_ai groq mistral openrouter together_ai xai")
"""Providers that read OpenAI's chat completions and answer in them: `auto` relays to these."""

RELAYED = words("api_base base_url api_key organization custom_llm_provider extra_headers headers ssl_verify")
"""Parameters of a model that a relayed call has a place for. Whoever states others wants litellm's handling."""

LIMITS = ("max_tokens", "max_completion_tokens")
_PROBE = 7


class NotResolved(ValueError):
    """No provider is known by this name, or not one that can be reached in the way that was asked for."""


def questions(params: Mapping[str, Any]) -> dict[str, Any]:
    """What the answer depends on, and no secret: names of parameters, values of three."""
    address = address_of(params)
    return {
        "model": params["model"],
        "api_base": bare_address(address) if address else address,
        "custom_llm_provider": params.get("custom_llm_provider"),
        "stated": sorted(name for name in params if is_provider_param(name)),
    }


def plainly(params: Mapping[str, Any], forward: Forward) -> Resolved | None:
    """Of a server with an address that reads OpenAI's format, as its provider's name says. None: ask litellm."""
    address, (prefix, _, bare) = address_of(params), str(params["model"]).partition("/")
    provider = params.get("custom_llm_provider") or prefix
    if provider not in VERBATIM or not address or is_openais(address) or not bare:
        return None
    without_place = _without_place(filter(is_provider_param, params))
    if forward == "relay" and without_place:
        return None  # it is refused there
    model = bare if prefix == provider else params["model"]
    translated = forward == "translate" or bool(without_place)
    return Resolved("translate" if translated else "relay", model, provider, address)


def by_litellm(litellm: Any, asked: Mapping[str, Any], forward: Forward) -> Resolved:
    """Raises NotResolved, and what litellm raises."""
    model, provider, _, base = litellm.get_llm_provider(
        asked["model"], custom_llm_provider=asked["custom_llm_provider"], api_base=asked["api_base"]
    )
    if provider in STRAYING:
        raise NotResolved(f"{provider} is not served, for it follows redirects")
    compatible = provider in SPEAKERS or provider in litellm.openai_compatible_providers
    base = asked["api_base"] or (base or DEFAULT_BASES.get(provider) if compatible else None)
    own = not asked["api_base"] or is_own_address(asked["api_base"], provider, _default(litellm, asked), os.environ)
    if forward == "translate" or not _is_relayed(provider, base, asked["stated"], forward):
        return Resolved("translate", model, provider, own_address=own and bool(asked["api_base"]))
    key = _key_variable(litellm, model, provider) if own else None
    return Resolved("relay", model, provider, base, key, _renames(litellm, model, provider), own)


def _default(litellm: Any, asked: Mapping[str, Any]) -> str | None:
    base: str | None = litellm.get_llm_provider(asked["model"], custom_llm_provider=asked["custom_llm_provider"])[3]
    return base


def _is_relayed(provider: str, base: str | None, stated: Collection[str], forward: Forward) -> bool:
    if forward == "relay":
        if not base:
            raise NotResolved(
                f"forward: relay needs api_base: {provider} has no address that is known to speak OpenAI's"
            )
        if without_place := _without_place(stated):
            raise NotResolved(
                f"forward: relay has no place for litellm_params.{without_place[0]}; leave one of them out"
            )
        return True
    if provider == "azure" and "/openai/v1" not in (base or ""):
        return False  # the older interface, with deployments and versions in the path
    return provider in SPEAKERS and bool(base) and not _without_place(stated)


def _without_place(stated: Iterable[str]) -> list[str]:
    """Parameters for the provider that only litellm can do something with."""
    return sorted(set(stated) - RELAYED)


def _key_variable(litellm: Any, model: str, provider: str) -> str | None:
    """Where litellm would look for a key, were there none; only known while no key is in the environment."""
    missing: list[str] = litellm.validate_environment(f"{provider}/{model}")["missing_keys"]
    named = [name for name in missing if name.endswith("_API_KEY")]  # bedrock's are no keys of this kind
    return next((name for name in named if name.startswith(provider.upper())), named[0] if named else None)


def _renames(litellm: Any, model: str, provider: str) -> dict[str, str]:
    """What the provider calls OpenAI's limits of an answer."""
    import openai

    found = {}
    for name, other in (LIMITS, LIMITS[::-1]):
        with suppress(openai.OpenAIError):  # it knows no such field at all
            sent = litellm.get_optional_params(model=model, custom_llm_provider=provider, **{name: _PROBE})
            if sent.get(other) == _PROBE:
                found[name] = other
    return found
