from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from proxy.settings.litellm_params import is_openai_url, is_provider_param, stated_address
from proxy.settings.model_config import NativeAPI
from proxy.storage.records import ModelRecord, ResolvedProvider
from proxy.upstream.key_scope import is_anthropics
from proxy.upstream.litellm_resolver import params_for_litellm
from proxy.upstream.provider_resolution import resolve_static

# How the encrypted reasoning begins that UniRoute writes into answers of the Responses API: no provider can read it.
OWN_REASONING_PREFIX = "uniroute:"

# The same for the signatures of thinking in Anthropic's Messages.
OWN_SIGNATURE_PREFIX = "uniroute:"

NO_APIS: frozenset[NativeAPI] = frozenset()

# The model's own parameters that have a place in another API's body → their name there.
BODY_PARAMS: Mapping[NativeAPI, Mapping[str, str]] = MappingProxyType(
    {
        "messages": MappingProxyType(
            {
                **{name: name for name in ("temperature", "top_p", "top_k", "thinking", "output_config")},
                **dict.fromkeys(("max_tokens", "max_completion_tokens"), "max_tokens"),
                "stop": "stop_sequences",
                "reasoning_effort": "output_config",
            }
        ),
        "responses": MappingProxyType(
            {
                **{name: name for name in ("temperature", "top_p", "top_logprobs", "parallel_tool_calls", "user")},
                **{name: name for name in ("service_tier", "safety_identifier", "prompt_cache_key", "reasoning")},
                **dict.fromkeys(("max_tokens", "max_completion_tokens"), "max_output_tokens"),
                "reasoning_effort": "reasoning",
            }
        ),
    }
)

# Parameters of litellm's translation alone, without which a direct call does the same.
_NOT_NEEDED = frozenset({"drop_params", "base_model", "hf_model_name"})


def native_apis(record: ModelRecord) -> frozenset[NativeAPI]:
    """Return the APIs besides chat completions in which a model can be asked directly.

    They are those that `model_info.api` states, or else the own API of OpenAI and of Anthropic at their own addresses,
    unless `forward: translate` is stated. A model that fixes parameters without a place in an API, or that litellm
    alone can reach, is not asked in it.
    """
    resolved = native_provider(record)
    if resolved is None or not _is_reachable(record, resolved):
        return NO_APIS
    stated = record.info.api
    apis = _own_apis(record, resolved) if stated is None else [api for api in stated if api != "chat"]
    return frozenset(api for api in apis if _takes_params(record, api))


def native_provider(record: ModelRecord) -> ResolvedProvider | None:
    """Return the provider of a model with its own name for the model; None: it is not known."""
    return record.resolved or resolve_static(record.litellm_params, record.info.forward)


def shares_provider(record: ModelRecord, other: ModelRecord) -> bool:
    """Return whether two models are asked at one place, which verifies or decrypts the reasoning of both."""
    if record.registered_name == other.registered_name:
        return True
    resolved, theirs = native_provider(record), native_provider(other)
    if resolved is None or theirs is None:
        return False
    addresses = [
        stated_address(each.litellm_params) or provider.api_base
        for each, provider in ((record, resolved), (other, theirs))
    ]
    return resolved.provider == theirs.provider and addresses[0] == addresses[1]


def reaches_anthropic(record: ModelRecord) -> bool:
    """Return whether requests in Anthropic's API go to Anthropic itself."""
    resolved = native_provider(record)
    return resolved is not None and is_anthropics(record.litellm_params, resolved)


def _own_apis(record: ModelRecord, resolved: ResolvedProvider) -> frozenset[NativeAPI]:
    if record.info.forward == "translate":
        return NO_APIS
    if is_anthropics(record.litellm_params, resolved):
        return frozenset({"messages"})
    address = stated_address(record.litellm_params)
    at_openai = resolved.provider == "openai" and is_openai_url(address or resolved.api_base or "")
    return frozenset({"responses"}) if at_openai else NO_APIS


def _is_reachable(record: ModelRecord, resolved: ResolvedProvider) -> bool:
    params = record.litellm_params
    has_address = stated_address(params) or resolved.api_base or resolved.provider in ("anthropic", "openai")
    return bool(has_address) and _NOT_NEEDED.issuperset(params_for_litellm(filter(is_provider_param, params)))


def _takes_params(record: ModelRecord, api: NativeAPI) -> bool:
    if not record.has_body_params:
        return True
    fixed = (name for name in record.litellm_params if name != "model" and not is_provider_param(name))
    return all(name == "system" or name in BODY_PARAMS[api] for name in fixed)
