from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from proxy.settings.litellm_params import is_provider_param
from proxy.settings.redaction import literals

# Providers that read OpenAI's own body: with an address of their own, the caller's goes to them as it is.
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

# Providers that litellm reaches by a client that follows redirects, whatever it is told.
FOLLOWS_REDIRECTS = frozenset({"aiohttp_openai"})

_AT_OPENAI = re.compile(r"https?://(?:[a-z0-9-]+\.)*api\.openai\.com(?::\d+)?(?:[/?#]|$)", re.IGNORECASE)

# Names of one thing: who states one of them has stated the thing.
SYNONYMS = (
    frozenset({"max_tokens", "max_completion_tokens"}),
    frozenset({"reasoning_effort", "reasoning", "thinking", "thinking_budget", "enable_thinking"}),
    frozenset({"tools", "functions"}),
    frozenset({"tool_choice", "function_call"}),
)

_SAME_MEANING = {name: names for names in SYNONYMS for name in names}

# What is shorter is a stand-in such as "-" or "none".
_MIN_SECRET = 8


def is_openai_url(address: str) -> bool:
    return _AT_OPENAI.match(address) is not None


def fixes_parameters(litellm_params: Mapping[str, Any]) -> bool:
    """Whether a model has parameters of its own that go into the body."""
    return any(name != "model" and not is_provider_param(name) for name in litellm_params)


def secrets_of(params: Mapping[str, Any], *keys: str | None) -> frozenset[str]:
    """Keys, tokens and the like, and whatever is sent in headers. `params`: a model's, resolved."""
    found = [*keys, *(each.value for name, value in params.items() for each in literals(name, value))]
    for name in ("extra_headers", "headers"):
        sent = params.get(name)
        found += [part for value in sent.values() for part in str(value).split()] if isinstance(sent, Mapping) else []
    return frozenset(value for value in found if isinstance(value, str) and len(value) >= _MIN_SECRET)


def merge_model_params(litellm_params: Mapping[str, Any], body: Mapping[str, Any]) -> dict[str, Any]:
    """The caller's body over the arm's own fixed parameters (temperature, max_tokens, system …): the caller wins.

    Field by field, and whole: what the caller states under one name of a thing takes the place of the arm's under any,
    and nothing within an object is mixed. A null states nothing. A system or developer message takes that of `system`.
    """
    fixed = {
        name: value
        for name, value in litellm_params.items()
        if name not in ("model", "system", "extra_body") and not is_provider_param(name)
    }
    fixed |= litellm_params.get("extra_body") or {}
    stated = _with_same_meaning(name for name, value in body.items() if value is not None)
    kept = {name: value for name, value in fixed.items() if name not in stated and value is not None}
    settled = _with_same_meaning(kept)
    merged = {**kept, **{name: value for name, value in body.items() if value is not None or name not in settled}}
    system = litellm_params.get("system")
    if system and not any(message.get("role") in ("system", "developer") for message in body["messages"]):
        merged["messages"] = [{"role": "system", "content": system}, *body["messages"]]
    return merged


def _with_same_meaning(names: Iterable[str]) -> set[str]:
    return {other for name in names for other in _SAME_MEANING.get(name, (name,))}
