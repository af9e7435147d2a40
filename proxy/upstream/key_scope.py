"""Which key may be sent where.

A key that a model states is for that model's provider, scheme, host and port. A change of any of them needs the key
stated again. A key that the environment holds for a provider is sent to the provider's own address alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from proxy.errors import BadRequest
from proxy.settings.litellm_params import PASSTHROUGH, is_openai_url, is_provider_param, stated_address
from proxy.settings.outbound import OutboundError
from proxy.settings.redaction import holds_secret, is_reference, strip_url
from proxy.storage.records import ModelRecord, ResolvedProvider
from proxy.upstream.pool import DEFAULT_PORTS

# Scheme, host and port.
KeyOrigin = tuple[str, str, int | None]


def origin_of(address: str) -> KeyOrigin:
    """Return the origin of an address. Text that is no address is an origin of its own."""
    try:
        parts = urlsplit(address)
        port = parts.port or DEFAULT_PORTS.get(parts.scheme)
    except ValueError:
        return ("", address, None)
    host = parts.hostname or ""
    return (parts.scheme, host.rstrip(".") if host else address, port)


# Where litellm sends requests by default, for providers of OpenAI's format.
DEFAULT_BASES = {"openai": "https://api.openai.com/v1", "openrouter": "https://openrouter.ai/api/v1"}

# The same for providers of other formats.
_OTHER_BASES = {
    "anthropic": "https://api.anthropic.com",
    "cohere": "https://api.cohere.com",
    "cohere_chat": "https://api.cohere.com",
    "gemini": "https://generativelanguage.googleapis.com",
    "ollama": "http://localhost:11434",
    "ollama_chat": "http://localhost:11434",
}

# Providers whose own addresses are all below one domain.
_OWN_DOMAINS = {"vertex_ai": ".googleapis.com", "bedrock": ".amazonaws.com", "sagemaker": ".amazonaws.com"}


def is_own_address(address: str, provider: str, default: str | None, environ: Mapping[str, str]) -> bool:
    """Return whether the environment's key of this provider may be sent to an address.

    Args:
        default: where litellm sends requests for this provider if no address is stated; None: not known.
        environ: an address that it states for the provider counts as the provider's own.
    """
    if provider == "openai" and is_openai_url(address):
        return True
    prefix = provider.upper()
    in_environment = [environ.get(f"{prefix}_{suffix}") for suffix in ("API_BASE", "BASE_URL")]
    own_addresses = [default, DEFAULT_BASES.get(provider), _OTHER_BASES.get(provider), *in_environment]
    scheme, host, _ = origin = origin_of(address)
    domain = _OWN_DOMAINS.get(provider.partition("_")[0]) or _OWN_DOMAINS.get(provider)
    return origin in [origin_of(each) for each in own_addresses if each] or (
        domain is not None and scheme == "https" and host.endswith(domain)
    )


def own_base(provider: str, environ: Mapping[str, str]) -> str:
    """Return a provider's own address, which the environment may name; an empty text if it is not known."""
    for name in ("API_BASE", "BASE_URL"):
        if stated := environ.get(f"{provider.upper()}_{name}"):
            return stated
    return DEFAULT_BASES.get(provider) or _OTHER_BASES.get(provider) or ""


_ADDRESS_VARIABLE_ENDS = ("_API_BASE", "_BASE_URL")


def address_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables in which litellm may find a provider's address."""
    return {name: value for name, value in environ.items() if name.endswith(_ADDRESS_VARIABLE_ENDS)}


def restore_credentials(address: str, provider: str, environ: Mapping[str, str]) -> str:
    """Add the user, password and query with which the environment states an address.

    What a provider was resolved to is stored without them. The provider's own variable counts before others.
    """
    variables = address_variables(environ)
    for name in sorted(variables, key=lambda name: not name.startswith(provider.upper())):
        stated = strip_url(variables[name]).rstrip("/")
        if address == stated or address.startswith(f"{stated}/"):
            credentials, query = urlsplit(variables[name]).netloc, urlsplit(variables[name]).query
            return urlsplit(address)._replace(netloc=credentials, query=query).geturl()
    return address


def is_anthropics(params: Mapping[str, Any], resolved: ResolvedProvider) -> bool:
    """Return whether requests go to Anthropic's own address."""
    return resolved.provider == "anthropic" and (resolved.own_address or not stated_address(params))


ADDRESSES = ("api_base", "base_url")


def stated_secrets(params: Mapping[str, Any]) -> list[str]:
    """Return the names of provider parameters that are or contain secrets: a key, a header with a key, a reference."""
    return [
        name
        for name, value in params.items()
        if is_provider_param(name) and name not in ADDRESSES and holds_secret(name, value)
    ]


# Providers for which litellm finds credentials in more places than variables: files, metadata services, logins.
_AMBIENT_CREDENTIALS = re.compile(
    r"(azure|bedrock|databricks|gigachat|github|oci|sagemaker|sap|snowflake|vertex|watsonx).*"
)

# Given to litellm as a key, so that it looks up none.
PLACEHOLDER_KEY = "-"


def key_for_litellm(
    params: Mapping[str, Any], provider: str, default: str | None, environ: Mapping[str, str]
) -> str | None:
    """Return the key to give litellm, so that it looks up none for an address that is not the provider's own.

    Returns:
        None: litellm may look up a key, or needs none.

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
    if resolved.provider in PASSTHROUGH or not (variable := _key_variable_of(resolved.provider, environ)):
        return
    raise BadRequest(
        f"{record.name}: {variable} is for {resolved.provider}'s own address, and is not sent to another: state"
        f" `api_key: os.environ/{variable}` to send it to api_base, or `api_key: none` if no key is needed there",
        param="litellm_params.api_key",
    )


def _key_variable_of(provider: str, environ: Mapping[str, str]) -> str | None:
    """Return the variable that is set and in which litellm may find the provider's key."""
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


_ADDRESS_PARAM = re.compile(r"(.*_)?(api_base|base_url|endpoint|auth_url|url|host)")


def _moved(before: ModelRecord, after: ModelRecord) -> str | None:
    """Return the parameter whose change leads to another origin or provider; None: there is none."""
    old, new = before.litellm_params, after.litellm_params
    for name in sorted({*old, *new}):
        address = is_provider_param(name) and _ADDRESS_PARAM.fullmatch(name)
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
    if after.resolved is None:  # the prefixes have to do; the records are compared again once it is resolved
        old, new = _provider_prefix(before), _provider_prefix(after)
        return old is not None and new is not None and old != new
    provider_before = before.resolved.provider if before.resolved is not None else _provider_prefix(before)
    return provider_before != after.resolved.provider


def _provider_prefix(record: ModelRecord) -> str | None:
    """Return the provider that the name of litellm's begins with; None: it begins with none."""
    prefix, slash, _ = str(record.litellm_params["model"]).partition("/")
    return prefix if slash else None
