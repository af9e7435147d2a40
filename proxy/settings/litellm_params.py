from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from proxy.settings.control_fields import is_control_field
from proxy.settings.redaction import find_secrets, is_reference, is_secret_name
from router_core.text import closest_name
from router_core.types import price_field

# Sections of a configuration file that are for LiteLLM's own proxy.
IGNORED_SECTIONS = frozenset(
    """
    litellm_settings router_settings general_settings environment_variables credential_list mcp_servers mcp_tools
    guardrails prompts vector_store_registry search_tools files_settings finetune_settings callback_settings
    assistant_settings batch_settings include policies agents skills cache
    """.split()
)

# Keys of `litellm_params` that steer LiteLLM's own proxy. They are dropped: waiting and retrying are set here.
IGNORED_PARAMS = frozenset(
    """
    rpm tpm itpm otpm weight order tags tag_regex max_budget budget_duration default_api_key_tpm_limit
    default_api_key_rpm_limit max_file_size_mb use_in_pass_through configurable_clientside_auth_params
    litellm_credential_name litellm_trace_id provider_affinity_header max_parallel_requests cooldown_time
    allow_client_keepalive_override keepalive_seconds use_litellm_proxy region_name max_retries num_retries timeout
    stream_timeout request_timeout force_timeout retry_policy allowed_fails allowed_fails_policy routing_strategy
    fallbacks default_fallbacks context_window_fallbacks content_policy_fallbacks caching stream stream_options
    """.split()
)

_INFO = frozenset(
    """
    id db_model updated_at updated_by created_at created_by base_model tier team_id team_public_model_name blocked
    discoverable access_windows access_groups litellm_provider mode max_tokens metadata description comment rules
    source supported_endpoints supported_modalities supported_output_modalities supported_regions
    supported_audio_formats deprecation_date tpm rpm output_vector_size off_peak_pricing prompt_cache_min_tokens
    supported_openai_params health_check_model health_check_timeout disable_background_health_check
    supports_image_input supports_url_context supports_tool_choice supports_prompt_caching supports_system_messages
    supports_native_streaming supports_web_search supports_computer_use supports_assistant_prefill
    supports_embedding_image_input supports_multimodal supports_tool_search supports_sampling_params
    supports_native_structured_output
    """.split()
)

_INFO_COSTS = re.compile(
    r"\w+_cost_per_(?!token$)\w+|\w+_token_cost_above_\w+|\w+_token_cost_(batches|flex|priority)|cost_per_second"
)

# A longer key is no name of litellm's, and would take quadratic time to match.
_MAX_NAME_CHARS = 200

# A misspelt price of a tier. Ignoring it would bill long prompts at too little.
_MISSPELT_TIER = re.compile(r"token\w*_above_(?!1hr$|(1hr_above_)?[0-9]+k?_tokens)")


def is_model_info_of_litellm(key: str) -> bool:
    """Return whether LiteLLM knows this key of model_info, and it has no meaning here."""
    if len(key) > _MAX_NAME_CHARS or price_field(key) is not None or _MISSPELT_TIER.search(key):
        return False
    return key in _INFO or _INFO_COSTS.fullmatch(key) is not None


# OpenAI's chat fields that litellm translates for each provider. All others travel in `extra_body`.
CHAT_FIELDS = frozenset(
    """
    functions function_call temperature top_p n stop max_tokens max_completion_tokens modalities prediction audio
    presence_penalty frequency_penalty logit_bias user response_format seed tools tool_choice parallel_tool_calls
    logprobs top_logprobs reasoning_effort verbosity safety_identifier service_tier store prompt_cache_key thinking
    web_search_options
    """.split()
)

# Fields for OpenAI's own records. Servers of other formats answer 400 to them, so they are not sent there.
OPENAI_ONLY = frozenset({"metadata", "store", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"})

# Parameters that go to the provider layer; all others but `model`, `system` and `extra_body` go into the body.
PROVIDER_PARAMS = frozenset(
    """
    api_base base_url api_key api_version organization custom_llm_provider extra_headers headers ssl_verify
    deployment_id azure_ad_token tenant_id client_id client_secret azure_username azure_password azure_scope
    supports_system_message merge_reasoning_content_in_choices base_model hf_model_name drop_params
    additional_drop_params allowed_openai_params
    """.split()
)

PROVIDER_FAMILIES = ("aws_", "vertex_", "azure_", "oci_", "watsonx_", "databricks_", "gigachat_", "sagemaker_")


def is_provider_param(name: str) -> bool:
    return name in PROVIDER_PARAMS or name.startswith(PROVIDER_FAMILIES)


_TEXT_PARAMS = ("api_base", "base_url", "api_key", "api_version", "organization", "custom_llm_provider", "system")

_OBJECT_PARAMS = ("extra_body", "extra_headers", "headers")

_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f]")

_COMMON_PARAMS = frozenset({"model", "system", "extra_body"})

_FAMILY_PARAMS = frozenset(
    """
    aws_access_key_id aws_secret_access_key aws_session_token aws_region_name aws_profile_name aws_role_name
    aws_session_name aws_web_identity_token aws_sts_endpoint aws_external_id aws_bedrock_runtime_endpoint
    vertex_project vertex_location vertex_credentials vertex_ai_project vertex_ai_location vertex_ai_credentials
    azure_ad_token azure_username azure_password azure_scope watsonx_region_name gigachat_auth_url
    """.split()
)

# Fields that well-known servers and providers read in a body, beside OpenAI's own.
_SERVER_FIELDS = frozenset(
    """
    top_k min_p top_a typical_p tfs_z mirostat mirostat_tau mirostat_eta repetition_penalty repeat_penalty
    repeat_last_n length_penalty early_stopping best_of use_beam_search num_beams do_sample ignore_eos min_tokens
    stop_token_ids bad_words allowed_token_ids include_stop_str_in_output skip_special_tokens
    spaces_between_special_tokens truncate_prompt_tokens prompt_logprobs echo add_generation_prompt
    continue_final_message add_special_tokens documents chat_template chat_template_kwargs guided_json guided_regex
    guided_choice guided_grammar guided_decoding_backend guided_whitespace_pattern structured_outputs priority
    logits_processors cache_salt num_ctx num_predict num_keep num_gpu num_thread num_batch keep_alive options format
    think raw grammar json_schema cache_prompt id_slot n_predict n_probs n_keep samplers dynatemp_range
    dynatemp_exponent xtc_probability xtc_threshold dry_multiplier dry_base dry_allowed_length dry_penalty_last_n
    safe_prompt random_seed prompt_mode reasoning reasoning_format reasoning_split include_reasoning thinking_budget
    enable_thinking enable_search transforms plugins search_parameters safety_settings generation_config
    system_instruction cached_content mcp_servers container context_management output_config speed inference_geo
    top_n_tokens details watermark max_new_tokens return_full_text metadata messages presence_penalty usage
    include_usage data_sources deferred include stop_sequences thinking_config google_maps_options user_id
    """.split()
)

# Fields of the body that a model may fix.
_BODY_FIELDS = CHAT_FIELDS | OPENAI_ONLY | _SERVER_FIELDS

_KNOWN = _COMMON_PARAMS | PROVIDER_PARAMS | _FAMILY_PARAMS | _BODY_FIELDS

_BY_LETTERS = {name.replace("_", ""): name for name in sorted(_KNOWN, reverse=True)}


class ParamError(ValueError):
    """A parameter of a model that cannot be used. `param` is its path."""

    def __init__(self, param: str, why: str) -> None:
        super().__init__(f"{param}{why}")
        self.param = param


def validate_litellm_params(params: Mapping[str, Any]) -> None:
    """Check the types that every call of the model relies on. Raises ValueError naming the field."""
    for name in _TEXT_PARAMS:
        if not isinstance(params.get(name), str | None):
            raise ValueError(f"litellm_params.{name} must be a text")
        if name != "system" and _CONTROL_CHARACTER.search(params.get(name) or ""):
            raise ValueError(f"litellm_params.{name} holds a line break or another control character")
    for name in _OBJECT_PARAMS:
        if not isinstance(params.get(name), dict | None):
            raise ValueError(f"litellm_params.{name} must be an object")
        for field, value in (params.get(name) or {}).items():
            if name != "extra_body" and not (isinstance(value, str) and not _CONTROL_CHARACTER.search(field + value)):
                raise ValueError(f"litellm_params.{name}.{field} must be a text without line breaks")
    if not isinstance(params.get("ssl_verify"), bool | str | None):
        raise ValueError("litellm_params.ssl_verify must be true, false or the path of a file of certificates")


def check_effects(params: Mapping[str, Any], model_info_names: frozenset[str] = frozenset()) -> None:
    """Refuse names and references that would have no effect, or another one than was meant.

    An unknown name that resembles no known one is taken for a field of the model's server, and sent in every body.

    Args:
        model_info_names: names that belong into model_info.

    Raises:
        ParamError: names the field and the fix.
    """
    for name in params:
        if name in IGNORED_PARAMS or (is_control_field(name) and not is_provider_param(name)):
            hint = "; state it in `model_info`" if name in model_info_names else ""
            raise ParamError(f"litellm_params.{name}", f" has no meaning here{hint}")
        if (meant := _intended_name(name)) is not None:
            raise ParamError(
                f"litellm_params.{name}",
                f": unknown key; did you mean {meant!r}? A field that only the model's server has goes into extra_body",
            )
    bases = {params[name] for name in ("api_base", "base_url") if params.get(name)}
    if len(bases) > 1:
        raise ParamError("litellm_params.base_url", " and api_base are two names of one thing, and differ; state one")
    for path in _references_in_body(params):
        why = ": a variable of the environment is not looked up in a field of the body; state secrets in extra_headers"
        raise ParamError(f"litellm_params.{path}", why)


def unknown_fields(params: Mapping[str, Any]) -> list[str]:
    """Return the names that are sent in every body though no known server reads them, sorted."""
    return sorted(name for name in params if name not in _KNOWN and not is_provider_param(name))


def stated_address(params: Mapping[str, Any]) -> str | None:
    """Return the address that a model's parameters state."""
    address: str | None = params.get("base_url") or params.get("api_base")
    return address


def _intended_name(name: str) -> str | None:
    """Return the known name that this one is a slip of, if it is one."""
    if name in _KNOWN:
        return None
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    if letters in _BY_LETTERS:
        return _BY_LETTERS[letters]
    closest = closest_name(name.lower(), _KNOWN, min_similarity=0.8)
    if closest or name.startswith(PROVIDER_FAMILIES):
        return closest
    return "api_key" if is_secret_name(name) else None


def _references_in_body(params: Mapping[str, Any]) -> Iterator[str]:
    for name, value in params.items():
        if not is_provider_param(name):
            yield from _references(name, value)


def _references(path: str, value: Any) -> Iterator[str]:
    if is_reference(value):
        yield path
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _references(f"{path}.{name}", inner)
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _references(f"{path}[{place}]", inner)


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


def has_body_params(litellm_params: Mapping[str, Any]) -> bool:
    """Return whether a model has parameters of its own that go into the body."""
    return any(name != "model" and not is_provider_param(name) for name in litellm_params)


def secrets_of(params: Mapping[str, Any], *keys: str | None) -> frozenset[str]:
    """Collect keys, tokens and whatever is sent in headers. `params`: a model's, with references resolved."""
    found = [*keys, *(each.value for name, value in params.items() for each in find_secrets(name, value))]
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
