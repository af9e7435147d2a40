from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from proxy.errors import BadRequest, FieldNotAllowed
from router_core.text import normalize

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
