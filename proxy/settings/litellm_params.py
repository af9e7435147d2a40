from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from proxy.errors import BadRequest, FieldNotAllowed
from proxy.settings.redaction import find_secrets, is_reference, is_secret_name
from router_core.text import closest_name, normalize
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
    discoverable access_windows access_groups litellm_provider max_tokens metadata description comment rules
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

# Providers that litellm knows and that are not served, and why.
NOT_SERVED = {
    "aiohttp_openai": "it follows redirects",
    "text-completion-inception": "it fills in code and does not chat; `inception/` is Inception's chat",
}

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
    system, messages = litellm_params.get("system"), body.get("messages")
    if system and messages is not None:  # a request for embeddings has no messages
        states_system = any(message.get("role") in ("system", "developer") for message in messages)
        merged["messages"] = messages if states_system else [{"role": "system", "content": system}, *messages]
    return merged


def _with_synonyms(names: Iterable[str]) -> set[str]:
    return {other for name in names for other in _SYNONYMS_OF.get(name, (name,))}


_NAMES = frozenset(
    """
    api_base base_url api_key api_version api_type organization deployment_id engine client shared_session transport
    extra_headers headers default_headers extra_query extra_body_headers provider_specific_header
    provider_affinity_header litellm_params litellm_metadata litellm_call_id litellm_logging_obj litellm_session_id
    litellm_trace_id litellm_system_prompt litellm_request_debug litellm_credential_name model_list model_info
    custom_llm_provider use_litellm_proxy proxy_server_request use_in_pass_through router mock_response
    mock_tool_calls mock_timeout mock_delay fallbacks context_window_fallback_dict context_window_fallbacks
    content_policy_fallbacks default_fallbacks num_retries max_retries retry_policy retry_strategy cooldown_time
    timeout request_timeout stream_timeout force_timeout drop_params additional_drop_params allowed_openai_params
    ssl_verify azure azure_ad_token azure_ad_token_provider azure_username azure_password azure_scope tenant_id
    client_id client_secret use_xai_oauth gigachat_access_token gigachat_auth_url gigachat_scope region_name
    callbacks success_callback failure_callback service_callback logger_fn no-log no_log caching cache cache_key
    preset_cache_key guardrails prompt_id prompt_variables prompt_label prompt_version acompletion atext_completion
    text_completion initial_prompt_value final_prompt_value roles bos_token eos_token hf_model_name base_model
    ensure_alternating_roles user_continue_message assistant_continue_message supports_system_message
    merge_reasoning_content_in_choices enable_json_schema_validation disable_add_transform_inline_image_block
    model_file_id_mapping enable_prompt_caching cache_control_injection_points timeout_by_service_tier
    stream_timeout_by_service_tier configurable_clientside_auth_params fireworks_forward_user_id bedrock_tags
    cost_per_query cost_per_second tiered_pricing data_residency output_vector_size secret_fields search_tool_name
    aembedding aimg_generation allm_passthrough_route async_call allow_client_keepalive_override
    allowed_model_region attempted_targets caching_groups client_side_timeout complete_response completion_call_id
    custom_prompt_dict fallback_depth fastest_response hugging_face replicate together_ai keepalive_seconds
    log_client_error_tracebacks max_agentic_loops max_budget budget_duration max_fallbacks max_file_size_mb
    max_parallel_requests model_alias_map model_config prompt_environment routing_strategy rust self silent_model
    stream_chunk_size stream_response tag_regex enable_tag_filtering turn_off_message_logging
    use_chat_completions_api use_client default_api_key_rpm_limit default_api_key_tpm_limit
    """.split()
)

_FAMILIES = re.compile(
    r"_.*|.*_cost_per_.*|cache_(creation|read)_input_.*|(auto|adaptive|complexity|quality)_router_.*"
    r"|(aws|vertex|azure|gigachat|oci|watsonx|litellm|sagemaker|databricks|s3|gcs|regional)_.*"
    r"|(arize|dd|humanloop|langfuse|langsmith|newrelic|posthog|signoz|wandb|weave)_.*"
    r"|anthropic_(disable|federation|identity|issuer|keycloak|organization|service)_.*|openai_(identity|service)_.*",
    re.DOTALL,  # else each repetition is tried up to a line end, in quadratic time
)

# Refused inside `metadata` too, where every other name is the caller's own.
_ADDRESSES_AND_KEYS = frozenset(
    """
    api_base base_url api_key api_version extra_headers headers default_headers litellm_params litellm_metadata
    custom_llm_provider model_list mock_response azure_ad_token aws_access_key_id aws_secret_access_key
    aws_session_token vertex_credentials ssl_verify callbacks success_callback failure_callback
    """.split()
)


_READ_BY_NAME = frozenset(
    """
    model messages stream stream_options uniroute models provider route metadata extra_body max_tokens
    max_completion_tokens n tools tool_choice functions response_format modalities audio user store
    """.split()
)

# Characters of a name that is not ASCII: to look for the same name in other letters takes microseconds for each.
MAX_NAME_CHARS = 1000

_INVISIBLE = re.compile(r"[\s\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff]")


# Names that need no comparison with each family: none is a control field, or looks like a field that is read.
COMMON_FIELDS = frozenset(
    """
    model messages stream stream_options max_tokens max_completion_tokens temperature top_p n stop seed tools
    tool_choice parallel_tool_calls response_format reasoning_effort presence_penalty frequency_penalty logprobs
    top_logprobs logit_bias user store metadata extra_body uniroute models provider route
    """.split()
)


def reject_control_fields(body: Mapping[str, Any]) -> None:
    """Refuse a chat body with a field that would choose addresses, keys or behaviour of the provider layer.

    Messages, tools and schemas are content and are not searched.

    Raises:
        FieldNotAllowed: names the field.
    """
    for name in body:
        if name in COMMON_FIELDS:
            continue
        if is_control_field(name):
            raise _refusal(name)
        if name not in _READ_BY_NAME and plain_name(name) in _READ_BY_NAME:
            raise _look_alike(name)
    if "extra_body" in body:
        _refuse_within(body["extra_body"], "extra_body", _is_nested_control_field)
    if "metadata" in body:
        _refuse_within(body["metadata"], "metadata", _is_address_or_key)


def is_control_field(name: str) -> bool:
    plain = plain_name(name)
    return plain in _NAMES or _FAMILIES.fullmatch(plain) is not None


def _is_nested_control_field(name: str) -> bool:
    """Return whether a server that unpacks `extra_body` would read this in place of what was checked."""
    return is_control_field(name) or plain_name(name) in ("model", "messages", "stream", "stream_options", "extra_body")


def _is_address_or_key(name: str) -> bool:
    return plain_name(name) in _ADDRESSES_AND_KEYS


def plain_name(name: str) -> str:
    """Fold a name as the least careful parser would: some ignore case, and Go's takes even U+017F for s."""
    if name.isascii():
        return name.strip().lower()
    if len(name) > MAX_NAME_CHARS:
        raise BadRequest(f"a field's name is longer than {MAX_NAME_CHARS} characters: {name[:40]!r}…")
    return _INVISIBLE.sub("", normalize("NFKC", name)).casefold()


def _refuse_within(value: Any, path: str, refused: Callable[[str], bool]) -> None:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if refused(name):
                raise _refusal(f"{path}.{name}")
            _refuse_within(inner, f"{path}.{name}", refused)
    elif isinstance(value, list):
        for inner in value:
            _refuse_within(inner, path, refused)


def _refusal(path: str) -> FieldNotAllowed:
    return FieldNotAllowed(
        f"`{path}` is set by whoever runs this proxy, not by a request; remove it from the body", param=path
    )


def _look_alike(name: str) -> FieldNotAllowed:
    return FieldNotAllowed(
        f"`{ascii(name)[1:-1][:60]}` could be read as `{plain_name(name)}`; write it so, or remove it", param=name[:60]
    )
