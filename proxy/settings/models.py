from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from proxy.routing.control_fields import is_control_field
from proxy.safety.redaction import is_reference, is_secret_name, shown
from proxy.settings.litellm_names import PARAMS
from proxy.upstream.litellm.params import (
    CHAT_FIELDS,
    OPENAI_ONLY,
    PROVIDER_FAMILIES,
    PROVIDER_PARAMS,
    is_provider_param,
)
from proxy.words import words
from router_core.types import MAX_PRICE, PRICE_FIELDS, Price, flat_price_field, price_field


class SettingsError(Exception):
    """A setting that cannot be used. One line: the file, the key, the value and what would fix it."""


def split_list(value: object) -> object:
    """A list written in one variable: JSON, or names with commas between them."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is not a JSON list ({error})") from None
    return [part.strip() for part in value.split(",") if part.strip()]


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}")

RESERVED_NAMES = frozenset({"auto", "uniroute/auto", "uniroute/best", "uniroute/cheap"})

_REFERENCE = "os.environ/"

Forward = Literal["relay", "translate", "auto"]
"""How requests reach a model: as they are, or in its provider's own format, or as is right for the provider."""


def check_model_name(name: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"a model name is 1 to 128 of A-Z a-z 0-9 . _ : / @ - and starts with a letter or digit; got {name!r}"
        )
    if {".", ".."}.intersection(name.split("/")):
        raise ValueError(f"a model name is part of a URL and cannot hold the steps . and .. ; got {name!r}")
    if name in RESERVED_NAMES:
        raise ValueError(f"{name!r} is the name that asks for routing; give the model another name")
    return name


def referred_variable(value: object, allowed_env: Collection[str] = ()) -> str | None:
    """NAME of `os.environ/NAME`, None for any other value. SettingsError if that variable may not be used."""
    if not isinstance(value, str) or not value.startswith(_REFERENCE):
        return None
    name = value.removeprefix(_REFERENCE)
    if name.startswith("UNIROUTE_") or not (name.endswith("_API_KEY") or name in allowed_env):
        raise SettingsError(
            f"{value}: only variables named *_API_KEY, or listed in allowed_env, may be used; got {name!r}"
        )
    return name


def resolve_secret(value: str, environ: Mapping[str, str], allowed_env: Collection[str] = ()) -> str:
    """`os.environ/NAME` → the variable's value; other text is itself. SettingsError if NAME is unset or not allowed."""
    name = referred_variable(value, allowed_env)
    if name is None:
        return value
    if not environ.get(name):
        raise SettingsError(f"{value}: the environment variable {name} is not set; export it before starting")
    return environ[name]


def _finite_at_least_zero(value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"must be a finite number, 0 or more; got {value!r}")
    return value


def _not_boolean(value: object) -> object:
    """YAML's `yes` and `on` are booleans, which would pass for the number 1."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number; got {str(value).lower()}")
    return value


def _as_written(value: object) -> object:
    """YAML's `on` and `off` are booleans, and a variable of the environment may say so in other words."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return _SWITCHED.get(value.lower(), value) if isinstance(value, str) else value


_SWITCHED = {**dict.fromkeys(("true", "yes", "1"), "on"), **dict.fromkeys(("false", "no", "0"), "off")}


NonNegativeFloat = Annotated[float, BeforeValidator(_not_boolean), AfterValidator(_finite_at_least_zero)]

StrictInt = Annotated[int, BeforeValidator(_not_boolean)]

PositiveInt = Annotated[StrictInt, Field(ge=1, le=10**12)]

Seconds = Annotated[NonNegativeFloat, Field(gt=0)]

TokenCost = Annotated[NonNegativeFloat, Field(le=MAX_PRICE)]

OffAutoOn = Annotated[Literal["off", "auto", "on"], BeforeValidator(_as_written)]

NameList = Annotated[tuple[str, ...], BeforeValidator(split_list)]

ModelName = Annotated[str, AfterValidator(check_model_name)]


class FrozenModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, protected_namespaces=())


TIERED = "tiered_pricing"


def with_flat_tiers(stated: Mapping[str, Any]) -> Mapping[str, Any]:
    """Replace `tiered_pricing`, a list of prices each with the `range` of prompt tokens that it is for.

    The first range's price is the model's; a range begins above its lower bound. What is no such list is left alone.
    """
    tiers = _tiers(stated.get(TIERED))
    if not tiers:
        return stated
    rates = {rate for _, tier in tiers for rate in tier}
    flat = {name: value for name, value in stated.items() if name != TIERED}
    for place, (tokens, tier) in enumerate(tiers):
        for rate in rates:
            # no tier is mixed with another: what it leaves out is an ordinary token of its own
            usual = PRICE_FIELDS[1] if rate.startswith("output_") else PRICE_FIELDS[0]
            if (value := tier.get(rate, tier.get(usual))) is not None:
                flat[flat_price_field(rate, tokens if place else None)] = value
    return flat


def _tiers(listed: Any) -> list[tuple[int, dict[str, Any]]]:
    """Lower bound and rates, ascending; none unless every one has a range and an input price."""
    if not isinstance(listed, list):
        return []
    tiers = []
    for tier in listed:
        bounds = tier.get("range") if isinstance(tier, Mapping) else None
        if not isinstance(bounds, list) or not bounds or not _is_bound(bounds[0]) or PRICE_FIELDS[0] not in tier:
            return []
        tiers.append((int(bounds[0]), {rate: tier[rate] for rate in PRICE_FIELDS if rate in tier}))
    return sorted(tiers, key=lambda tier: tier[0])


def _is_bound(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 10**12


_TEXTS = ("api_base", "base_url", "api_key", "api_version", "organization", "custom_llm_provider", "system")

_OBJECTS = ("extra_body", "extra_headers", "headers")

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

_LIKENESS = 0.8
"""Of a name to one that is known, from which on it is taken for a slip: one letter in five."""

_OURS = frozenset({"model", "system", "extra_body"})

_FAMILY_PARAMS = words("""
    aws_access_key_id aws_secret_access_key aws_session_token aws_region_name aws_profile_name aws_role_name
    aws_session_name aws_web_identity_token aws_sts_endpoint aws_external_id aws_bedrock_runtime_endpoint
    vertex_project vertex_location vertex_credentials vertex_ai_project vertex_ai_location vertex_ai_credentials
    azure_ad_token azure_username azure_password azure_scope watsonx_region_name gigachat_auth_url
""")

_SERVER_FIELDS = words("""
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
""")
"""Fields that well-known servers and providers read in a body, beside OpenAI's own."""

_BODY_FIELDS = CHAT_FIELDS | OPENAI_ONLY | _SERVER_FIELDS

_KNOWN = _OURS | PROVIDER_PARAMS | _FAMILY_PARAMS | _BODY_FIELDS

_SQUEEZED = {name.replace("_", ""): name for name in sorted(_KNOWN, reverse=True)}


class ParamError(ValueError):
    """A parameter of a model that cannot be taken. `param`: its path."""

    def __init__(self, param: str, why: str) -> None:
        super().__init__(f"{param}{why}")
        self.param = param


def validate_litellm_params(params: Mapping[str, Any]) -> None:
    """Check what every call of the model would stumble over. Raises ValueError naming the field."""
    for name in _TEXTS:
        if not isinstance(params.get(name), str | None):
            raise ValueError(f"litellm_params.{name} must be a text")
        if name != "system" and _CONTROL.search(params.get(name) or ""):
            raise ValueError(f"litellm_params.{name} holds a line break or another control character")
    for name in _OBJECTS:
        if not isinstance(params.get(name), dict | None):
            raise ValueError(f"litellm_params.{name} must be an object")
        for field, value in (params.get(name) or {}).items():
            if name != "extra_body" and not (isinstance(value, str) and not _CONTROL.search(field + value)):
                raise ValueError(f"litellm_params.{name}.{field} must be a text without line breaks")
    if not isinstance(params.get("ssl_verify"), bool | str | None):
        raise ValueError("litellm_params.ssl_verify must be true, false or the path of a file of certificates")


def check_effects(params: Mapping[str, Any], elsewhere: frozenset[str] = frozenset()) -> None:
    """Refuse names and references that would have no effect, or another one than was meant.

    A name that nobody knows and that is like no known one is a field for the model's server, sent in every body.

    Args:
        elsewhere: names that belong into model_info.

    Raises:
        ParamError: names the field and the fix.
    """
    for name in params:
        if name in PARAMS or (is_control_field(name) and not is_provider_param(name)):
            hint = "; state it in `model_info`" if name in elsewhere else ""
            raise ParamError(f"litellm_params.{name}", f" has no meaning here{hint}")
        if (meant := _meant(name)) is not None:
            raise ParamError(
                f"litellm_params.{name}",
                f": unknown key; did you mean {meant!r}? A field that only the model's server has goes into extra_body",
            )
    bases = {params[name] for name in ("api_base", "base_url") if params.get(name)}
    if len(bases) > 1:
        raise ParamError("litellm_params.base_url", " and api_base are two names of one thing, and differ; state one")
    for path in _unread_references(params):
        why = ": a variable of the environment is not looked up in a field of the body; state secrets in extra_headers"
        raise ParamError(f"litellm_params.{path}", why)


def unknown_fields(params: Mapping[str, Any]) -> list[str]:
    """Names that are sent in every body though nobody is known to read them."""
    return sorted(name for name in params if name not in _KNOWN and not is_provider_param(name))


def _meant(name: str) -> str | None:
    """The known name that this one is a slip of."""
    if name in _KNOWN:
        return None
    squeezed = re.sub(r"[^a-z0-9]", "", name.lower())
    if squeezed in _SQUEEZED:
        return _SQUEEZED[squeezed]
    near = difflib.get_close_matches(name.lower(), _KNOWN, n=1, cutoff=_LIKENESS)
    if near or name.startswith(PROVIDER_FAMILIES):
        return near[0] if near else None
    return "api_key" if is_secret_name(name) else None


def _unread_references(params: Mapping[str, Any]) -> Iterator[str]:
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


class ModelInfo(FrozenModel):
    """What is known of a model, under LiteLLM's names. None: unknown. Prices are USD per token.

    The prices of tiers, `input_cost_per_token_above_200k_tokens` and its like, have names without number: they are kept
    as extra fields, and nothing else is.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, TokenCost] = Field(init=False)

    input_cost_per_token: TokenCost | None = None
    output_cost_per_token: TokenCost | None = None
    cache_read_input_token_cost: TokenCost | None = None
    cache_creation_input_token_cost: TokenCost | None = None
    cache_creation_input_token_cost_above_1hr: TokenCost | None = None
    input_cost_per_audio_token: TokenCost | None = None
    cache_read_input_audio_token_cost: TokenCost | None = None
    input_cost_per_image_token: TokenCost | None = None
    output_cost_per_reasoning_token: TokenCost | None = None
    output_cost_per_audio_token: TokenCost | None = None
    output_cost_per_image_token: TokenCost | None = None
    free: bool = False
    max_input_tokens: PositiveInt | None = None
    max_output_tokens: PositiveInt | None = None
    supports_function_calling: bool | None = None
    supports_parallel_function_calling: bool | None = None
    supports_vision: bool | None = None
    supports_video_input: bool | None = None
    supports_audio_input: bool | None = None
    supports_audio_output: bool | None = None
    supports_pdf_input: bool | None = None
    supports_response_schema: bool | None = None
    supports_reasoning: bool | None = None
    supports_stream_options: bool | None = None
    """Whether it may be sent `stream_options`, by which streams are asked for usage. None: that is found out."""
    connect_timeout_s: Seconds | None = None
    first_token_timeout_s: Seconds | None = None
    idle_timeout_s: Seconds | None = None
    forward: Forward = "auto"
    """relay: OpenAI's format goes through as it is. translate: litellm writes the provider's. auto: as the provider."""
    max_parallel_requests: PositiveInt | None = None
    """Of one process. None: no cap."""
    max_queued_requests: Annotated[StrictInt, Field(ge=0, le=10_000)] | None = None
    """Beyond these. None: as many as `max_parallel_requests`."""

    @property
    def prices(self) -> dict[str, float]:
        """What is stated of a price, each under one name."""
        every = {**{name: getattr(self, name) for name in PRICE_FIELDS}, **self.__pydantic_extra__}
        return {
            flat_price_field(*field): value
            for name, value in every.items()
            if value is not None and (field := price_field(name)) is not None
        }

    @model_validator(mode="before")
    @classmethod
    def _only_prices_are_extra(cls, stated: Any) -> Any:
        if not isinstance(stated, dict):
            return stated
        tiered = dict(with_flat_tiers(stated))
        unknown = [name for name in tiered if name not in cls.model_fields and price_field(str(name)) is None]
        if unknown:
            errors = [InitErrorDetails(type="extra_forbidden", loc=(name,), input=tiered[name]) for name in unknown]
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return {name: value for name, value in tiered.items() if name in cls.model_fields or value is not None}

    @model_validator(mode="after")
    def _price_is_whole(self) -> ModelInfo:
        stated = (self.input_cost_per_token, self.output_cost_per_token)
        if (stated[0] is None) != (stated[1] is None):
            raise ValueError("a price needs both input_cost_per_token and output_cost_per_token; one is missing")
        if self.free and any(self.prices.values()):
            raise ValueError("free: true and a price contradict each other; remove one")
        Price.from_fields({PRICE_FIELDS[0]: 0.0, PRICE_FIELDS[1]: 0.0, **self.prices})
        if len(self.prices) != sum(getattr(self, name) is not None for name in PRICE_FIELDS) + len(
            self.__pydantic_extra__
        ):
            raise ValueError("a price of a tier is stated twice, as in above_1k_tokens and above_1000_tokens")
        return self


class ModelConfig(FrozenModel):
    """One model of `model_list`. `litellm_params` reach the provider layer whole; keys in them are never shown."""

    model_name: ModelName
    litellm_params: dict[str, Any]
    model_info: ModelInfo = ModelInfo()

    @model_validator(mode="after")
    def _names_a_model(self) -> ModelConfig:
        model = self.litellm_params.get("model")
        if not isinstance(model, str) or not model:
            raise ValueError("litellm_params needs `model`, as in openai/gpt-4.1-mini")
        validate_litellm_params(self.litellm_params)
        return self

    def check_effects(self) -> None:
        """Refuse what would be accepted and have no effect. Raises ParamError.

        A record that is stored already is not held to it: what is known may have grown since.
        """
        check_effects(self.litellm_params, frozenset(ModelInfo.model_fields))
        if self.model_info.max_queued_requests is not None and self.model_info.max_parallel_requests is None:
            raise ParamError("model_info.max_queued_requests", " counts only with max_parallel_requests; state both")

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        told = {key: shown(key, value) for key, value in self.litellm_params.items() if key in ("model", "api_base")}
        return [("model_name", self.model_name), ("litellm_params", told), ("model_info", self.model_info)]
