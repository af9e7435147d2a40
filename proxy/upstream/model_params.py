from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from proxy.settings.litellm_params import is_provider_param
from proxy.settings.redaction import literals

# Providers that read OpenAI's own body. With an address of their own, they get the caller's body as it is.
PASSTHROUGH = frozenset(
    {
        "openai",
        "custom_openai",
        "hosted_vllm",
        "lm_studio",
        "llamafile",
        "litellm_proxy",
        "docker_model_runner",
        "xinference",
        "openai_like",
    }
)

# Providers that litellm calls with a client that follows redirects, whatever it is told.
FOLLOWS_REDIRECTS = frozenset({"aiohttp_openai"})

_AT_OPENAI = re.compile(r"https?://(?:[a-z0-9-]+\.)*api\.openai\.com(?::\d+)?(?:[/?#]|$)", re.IGNORECASE)

# Names of one parameter: to state one of them is to state all.
SYNONYMS = (
    frozenset({"max_tokens", "max_completion_tokens"}),
    frozenset({"reasoning_effort", "reasoning", "thinking", "thinking_budget", "enable_thinking"}),
    frozenset({"tools", "functions"}),
    frozenset({"tool_choice", "function_call"}),
)

_SYNONYMS_OF = {name: names for names in SYNONYMS for name in names}

# A shorter key is a stand-in such as "-" or "none".
_MIN_SECRET_CHARS = 8


def is_openai_url(address: str) -> bool:
    return _AT_OPENAI.match(address) is not None


def secrets_of(params: Mapping[str, Any], *keys: str | None) -> frozenset[str]:
    """Collect keys, tokens and whatever is sent in headers. `params`: a model's, with references resolved."""
    found = [*keys, *(each.value for name, value in params.items() for each in literals(name, value))]
    for name in ("extra_headers", "headers"):
        sent = params.get(name)
        found += [part for value in sent.values() for part in str(value).split()] if isinstance(sent, Mapping) else []
    return frozenset(value for value in found if isinstance(value, str) and len(value) >= _MIN_SECRET_CHARS)


def merge_model_params(litellm_params: Mapping[str, Any], body: Mapping[str, Any]) -> dict[str, Any]:
    """Merge a caller's body over the model's own parameters (temperature, max_tokens, system …); the caller wins.

    What the caller states under one of several synonyms replaces the model's value under any of them. Objects are not
    merged, and a null states nothing. A system or developer message of the caller replaces `system`.
    """
    fixed = {
        name: value
        for name, value in litellm_params.items()
        if name not in ("model", "system", "extra_body") and not is_provider_param(name)
    }
    fixed |= litellm_params.get("extra_body") or {}
    stated = _with_synonyms(name for name, value in body.items() if value is not None)
    kept = {name: value for name, value in fixed.items() if name not in stated and value is not None}
    settled = _with_synonyms(kept)
    merged = {**kept, **{name: value for name, value in body.items() if value is not None or name not in settled}}
    system = litellm_params.get("system")
    if system and not any(message.get("role") in ("system", "developer") for message in body["messages"]):
        merged["messages"] = [{"role": "system", "content": system}, *body["messages"]]
    return merged


def _with_synonyms(names: Iterable[str]) -> set[str]:
    return {other for name in names for other in _SYNONYMS_OF.get(name, (name,))}
