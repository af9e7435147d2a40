from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from proxy.safety.redaction import literals
from proxy.words import words

VERBATIM = frozenset(
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
"""Providers that read OpenAI's own body: with an address of their own, the caller's goes to them as it is."""

FOLLOWS_REDIRECTS = frozenset({"aiohttp_openai"})
"""Providers that litellm reaches by a client that follows redirects, whatever it is told."""

_AT_OPENAI = re.compile(r"https?://(?:[a-z0-9-]+\.)*api\.openai\.com(?::\d+)?(?:[/?#]|$)", re.IGNORECASE)

CHAT_FIELDS = words("""
    functions function_call temperature top_p n stop max_tokens max_completion_tokens modalities prediction audio
    presence_penalty frequency_penalty logit_bias user response_format seed tools tool_choice parallel_tool_calls
    logprobs top_logprobs reasoning_effort verbosity safety_identifier service_tier store prompt_cache_key thinking
    web_search_options
""")
"""OpenAI's chat fields that litellm translates for each provider. All others travel in `extra_body`."""

OPENAI_ONLY = frozenset({"metadata", "store", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"})
"""Book-keeping at OpenAI. Other formats have no place for it and answer 400, so it stays here."""

PROVIDER_PARAMS = words("""
    api_base base_url api_key api_version organization custom_llm_provider extra_headers headers ssl_verify
    deployment_id azure_ad_token tenant_id client_id client_secret azure_username azure_password azure_scope
    supports_system_message merge_reasoning_content_in_choices base_model hf_model_name drop_params
    additional_drop_params allowed_openai_params
""")

PROVIDER_FAMILIES = ("aws_", "vertex_", "azure_", "oci_", "watsonx_", "databricks_", "gigachat_", "sagemaker_")

SYNONYMS = (
    words("max_tokens max_completion_tokens"),
    words("reasoning_effort reasoning thinking thinking_budget enable_thinking"),
    words("tools functions"),
    words("tool_choice function_call"),
)
"""Names of one thing: who states one of them has stated the thing."""

_SAME_MEANING = {name: names for names in SYNONYMS for name in names}

_MIN_SECRET = 8
"""What is shorter is a stand-in such as "-" or "none"."""


@dataclass(frozen=True)
class LiteLLMTarget:
    """What litellm makes of a model name: who serves it, and where."""

    name: str
    model: str
    api_base: str | None
    api_key: str | None = field(default=None, repr=False)
    secrets: frozenset[str] = field(default=frozenset(), repr=False)
    """What must not come back to a caller in this provider's words."""

    @property
    def verbatim(self) -> bool:
        """The caller's body is this provider's own format, at an address that someone configured."""
        return self.name in VERBATIM and bool(self.api_base) and not is_openai_url(self.api_base or "")

    @property
    def openai_format(self) -> bool:
        return self.name in VERBATIM or self.name == "azure"


def is_openai_url(address: str) -> bool:
    return _AT_OPENAI.match(address) is not None


def is_provider_param(name: str) -> bool:
    return name in PROVIDER_PARAMS or name.startswith(PROVIDER_FAMILIES)


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


def call_arguments(
    provider: LiteLLMTarget, body: Mapping[str, Any], *, stream: bool, asks_usage: bool = True
) -> dict[str, Any]:
    """What the caller's part of a litellm call is. `body` has been through arm_body."""
    sent = {name: value for name, value in body.items() if name not in ("model", "stream", "stream_options")}
    if stream and asks_usage:
        options = body.get("stream_options")
        sent["stream_options"] = {**(options if isinstance(options, Mapping) else {}), "include_usage": True}
    if provider.verbatim:
        # litellm gets a blank turn and the real body overrides it: it checks, rewrites and logs what it is shown
        return {
            "messages": [{"role": "user", "content": "-"}],
            "extra_body": sent,
            "stream": stream,
            "_skip_responses_api_bridge": True,
        }
    fields = {name: value for name, value in sent.items() if name in CHAT_FIELDS and value is not None}
    rest = {name: value for name, value in sent.items() if name not in CHAT_FIELDS}
    arguments = {"messages": rest.pop("messages"), "stream": stream}
    if "stream_options" in rest:
        arguments["stream_options"] = rest.pop("stream_options")
    if not provider.openai_format:
        fields, rest = _without(fields, OPENAI_ONLY), _without(rest, OPENAI_ONLY)
    return copy.deepcopy({**arguments, **fields, **({"extra_body": rest} if rest else {})})  # litellm rewrites in place


def _without(fields: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}
