from __future__ import annotations

import re

from router_core.types import price_field


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SECTIONS = _words("""
    litellm_settings router_settings general_settings environment_variables credential_list mcp_servers mcp_tools
    guardrails prompts vector_store_registry search_tools files_settings finetune_settings callback_settings
    assistant_settings batch_settings include policies agents skills cache
""")

PARAMS = _words("""
    rpm tpm itpm otpm weight order tags tag_regex max_budget budget_duration default_api_key_tpm_limit
    default_api_key_rpm_limit max_file_size_mb use_in_pass_through configurable_clientside_auth_params
    litellm_credential_name litellm_trace_id provider_affinity_header max_parallel_requests cooldown_time
    allow_client_keepalive_override keepalive_seconds use_litellm_proxy region_name max_retries num_retries timeout
    stream_timeout request_timeout force_timeout retry_policy allowed_fails allowed_fails_policy routing_strategy
    fallbacks default_fallbacks context_window_fallbacks content_policy_fallbacks caching stream stream_options
""")
"""Keys of `litellm_params` that steer LiteLLM's own proxy. They are dropped: waiting and retrying are set here."""

_INFO = _words("""
    id db_model updated_at updated_by created_at created_by base_model tier team_id team_public_model_name blocked
    discoverable access_windows access_groups litellm_provider mode max_tokens metadata description comment rules source
    supported_endpoints supported_modalities supported_output_modalities supported_regions supported_audio_formats
    deprecation_date tpm rpm output_vector_size off_peak_pricing prompt_cache_min_tokens
    supported_openai_params health_check_model health_check_timeout disable_background_health_check
    supports_image_input supports_url_context supports_tool_choice supports_prompt_caching supports_system_messages
    supports_native_streaming supports_web_search supports_computer_use supports_assistant_prefill
    supports_embedding_image_input supports_multimodal supports_tool_search supports_sampling_params
    supports_native_structured_output
""")

_INFO_COSTS = re.compile(
    r"\w+_cost_per_(?!token$)\w+|\w+_token_cost_above_\w+|\w+_token_cost_(batches|flex|priority)|cost_per_second"
)

_MAX_NAME_CHARS = 200
"""Characters: what is longer is no name of litellm's, and would take quadratic time to compare."""


_ODD_TIER = re.compile(r"token\w*_above_(?!1hr$|(1hr_above_)?[0-9]+k?_tokens)")
"""The price of a tier that is misspelt: ignored, it would bill long prompts at too little."""


def is_model_info_of_litellm(key: str) -> bool:
    if len(key) > _MAX_NAME_CHARS or price_field(key) is not None or _ODD_TIER.search(key):
        return False
    return key in _INFO or _INFO_COSTS.fullmatch(key) is not None
