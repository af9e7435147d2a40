"""Keep each key to the provider and the address that it was stated for.

A key that a model states is for that model's provider, scheme, host and port. A change of any of them needs it stated
again. A key that the environment holds for a provider is for the provider's own address alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from proxy.errors import BadRequest
from proxy.settings.litellm_params import PASSTHROUGH, is_openai_url, is_provider_param, stated_address
from proxy.settings.outbound import OutboundError
from proxy.settings.redaction import holds_secret, is_reference
from proxy.storage.models import ModelRecord

# Where litellm goes by default, for providers of OpenAI's format.
DEFAULT_BASES = {"openai": "https://api.openai.com/v1", "openrouter": "https://openrouter.ai/api/v1"}

_OTHER_BASES = {
    "anthropic": "https://api.anthropic.com",
    "cohere": "https://api.cohere.com",
    "cohere_chat": "https://api.cohere.com",
    "gemini": "https://generativelanguage.googleapis.com",
    "ollama": "http://localhost:11434",
    "ollama_chat": "http://localhost:11434",
}

_OWN_HOSTS = {"vertex_ai": ".googleapis.com", "bedrock": ".amazonaws.com", "sagemaker": ".amazonaws.com"}

# Providers for which litellm finds credentials in more places than variables: files, metadata services, logins.
_AMBIENT_CREDENTIALS = re.compile(
    r"(azure|bedrock|databricks|gigachat|github|oci|sagemaker|sap|snowflake|vertex|watsonx).*"
)

# Given as a key so that litellm looks up none.
PLACEHOLDER_KEY = "-"

_ADDRESS = re.compile(r"(.*_)?(api_base|base_url|endpoint|auth_url|url|host)")

_PORTS = {"http": 80, "https": 443}

ADDRESSES = ("api_base", "base_url")

Origin = tuple[str, str, int | None]


def origin_of(address: str) -> Origin:
    """Return scheme, host and port. Text that is no address is an origin of its own."""
    try:
        parts = urlsplit(address)
        port = parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        return ("", address, None)
    host = parts.hostname or ""
    return (parts.scheme, host.rstrip(".") if host else address, port)


def is_own_address(address: str, provider: str, default: str | None, environ: Mapping[str, str]) -> bool:
    """Return whether the environment's key of this provider may be sent to an address.

    Args:
        default: where litellm goes for this provider if no address is stated; None if that is not known.
        environ: an address that it states for the provider counts as the provider's own.
    """
    if provider == "openai" and is_openai_url(address):
        return True
    prefix = provider.upper()
    named = [environ.get(f"{prefix}_{suffix}") for suffix in ("API_BASE", "BASE_URL")]
    known = [default, DEFAULT_BASES.get(provider), _OTHER_BASES.get(provider), *named]
    scheme, host, _ = origin = origin_of(address)
    below = _OWN_HOSTS.get(provider.partition("_")[0]) or _OWN_HOSTS.get(provider)
    return origin in [origin_of(each) for each in known if each] or (
        below is not None and scheme == "https" and host.endswith(below)
    )


def stated_secrets(params: Mapping[str, Any]) -> list[str]:
    """Return the parameters for the provider that are or hold secrets: a key, a header with a key, a reference."""
    return [
        name
        for name, value in params.items()
        if is_provider_param(name) and name not in ADDRESSES and holds_secret(name, value)
    ]


def key_for_litellm(
    params: Mapping[str, Any], provider: str, default: str | None, environ: Mapping[str, str]
) -> str | None:
    """Choose the key to give litellm, so that it looks up none for an address that is not the provider's own.

    Returns:
        None: litellm may look one up, or needs none.

    Raises:
        OutboundError: litellm would look up the provider's credentials whatever key it is given.
    """
    stated, address = params.get("api_key"), stated_address(params)
    if stated or not address or is_own_address(address, provider, default, environ):
        return stated or None
    if _AMBIENT_CREDENTIALS.fullmatch(provider) and not stated_secrets(params):
        raise OutboundError(
            f"the environment's credentials are for {provider}'s own address, and not sent to another; state those for"
            " api_base in litellm_params"
        )
    if provider.startswith("ollama") and not environ.get("OLLAMA_API_KEY"):
        return None
    return PLACEHOLDER_KEY


def check_environment_key(record: ModelRecord, environ: Mapping[str, str]) -> None:
    """Refuse a model for which litellm would send the environment's key to another address. Raises BadRequest."""
    params, resolved = record.litellm_params, record.resolved
    if resolved is None or resolved.own_address or not stated_address(params):
        return
    if params.get("api_key") or stated_secrets(params):
        return
    if resolved.provider in PASSTHROUGH or not (found := _variable_of(resolved.provider, environ)):
        return
    raise BadRequest(
        f"{record.name}: {found} is for {resolved.provider}'s own address, and is not sent to another: state `api_key:"
        f" os.environ/{found}` to send it to api_base, or `api_key: none` if no key is needed there",
        param="litellm_params.api_key",
    )


def _variable_of(provider: str, environ: Mapping[str, str]) -> str | None:
    plain = provider.replace("_", "").upper()
    for name in sorted(environ):
        stem = name.removesuffix("_API_KEY").replace("_", "")
        if name.endswith("_API_KEY") and stem and environ[name] and plain.startswith(stem):
            return name
    return None


def check_secrets_stay(before: ModelRecord, after: ModelRecord, stated: Mapping[str, Any]) -> None:
    """Refuse a change that would send a secret elsewhere, unless the change states that secret again.

    Args:
        stated: the litellm_params of the change itself.

    Raises:
        BadRequest: names the secret and what moved.
    """
    moved = _moved(before, after)
    if moved is None:
        return
    for name in stated_secrets(after.litellm_params):
        if name not in stated:
            raise BadRequest(
                f"`litellm_params.{moved}` changes where `{name}` is sent: state `{name}` again in the same change, or"
                " null to drop it",
                param=f"litellm_params.{name}",
            )


def _moved(before: ModelRecord, after: ModelRecord) -> str | None:
    """Return the parameter whose change leads to another origin or provider."""
    old, new = before.litellm_params, after.litellm_params
    for name in sorted({*old, *new}):
        address = is_provider_param(name) and _ADDRESS.fullmatch(name)
        if address and _stated_origin(old.get(name)) != _stated_origin(new.get(name)):
            return name
    if old.get("custom_llm_provider") != new.get("custom_llm_provider"):
        return "custom_llm_provider"
    return "model" if _changes_provider(before, after) else None


def _stated_origin(address: Any) -> Any:
    return origin_of(address) if isinstance(address, str) and not is_reference(address) else address


def _changes_provider(before: ModelRecord, after: ModelRecord) -> bool:
    if before.litellm_params["model"] == after.litellm_params["model"]:
        return False
    if after.resolved is None:  # it is compared again once that is known
        old, new = _prefix(before), _prefix(after)
        return old is not None and new is not None and old != new
    known = before.resolved.provider if before.resolved is not None else _prefix(before)
    return known != after.resolved.provider


def _prefix(record: ModelRecord) -> str | None:
    prefix, slash, _ = str(record.litellm_params["model"]).partition("/")
    return prefix if slash else None
