from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from proxy.settings.effort import Effort, read_efforts
from proxy.settings.litellm_params import (
    ParamError,
    check_effects,
    validate_litellm_params,
)
from proxy.settings.redaction import redact_value
from router_core.types import MAX_PRICE, PRICE_FIELDS, Price, flat_price_field, price_field


class SettingsError(Exception):
    """A setting cannot be used. The message is one line: the file, the key, the value and the fix."""


def split_list(value: object) -> object:
    """Split a list that is written in one variable: JSON, or names with commas between them."""
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

# What LiteLLM says a model is for. Models of EMBEDDING are asked for embeddings, all others for chat completions.
Mode = Literal[
    "chat",
    "completion",
    "responses",
    "embedding",
    "rerank",
    "moderation",
    "realtime",
    "batch",
    "search",
    "ocr",
    "image_generation",
    "image_edit",
    "audio_transcription",
    "audio_speech",
    "video_generation",
    "vector_store",
    "evaluation",
    "extraction",
    "guardrail",
]

EMBEDDING = "embedding"

# How requests reach a model: as they are, or in its provider's own format, or as is right for the provider.
Forward = Literal["relay", "translate", "auto"]

# APIs that an upstream may speak besides chat completions: a client of the same API is relayed.
NativeAPI = Literal["responses", "messages"]

UpstreamAPI = Literal["chat", NativeAPI]


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
    """Return NAME of `os.environ/NAME`, or None for any other value.

    Raises:
        SettingsError: this variable may not be used.
    """
    if not isinstance(value, str) or not value.startswith(_REFERENCE):
        return None
    name = value.removeprefix(_REFERENCE)
    if name.startswith("UNIROUTE_") or not (name.endswith("_API_KEY") or name in allowed_env):
        raise SettingsError(
            f"{value}: only variables named *_API_KEY, or listed in allowed_env, may be used; got {name!r}"
        )
    return name


def resolve_secret(value: str, environ: Mapping[str, str], allowed_env: Collection[str] = ()) -> str:
    """Return the variable's value for `os.environ/NAME`, and any other text as it is.

    Raises:
        SettingsError: NAME is unset or not allowed.
    """
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
    """Refuse booleans, which YAML makes of `yes` and `on`, and which would pass for the number 1."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number; got {str(value).lower()}")
    return value


def _on_or_off(value: object) -> object:
    """Accept the booleans that YAML makes of `on` and `off`, and other words for them."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return _ON_OR_OFF.get(value.lower(), value) if isinstance(value, str) else value


_ON_OR_OFF = {**dict.fromkeys(("true", "yes", "1"), "on"), **dict.fromkeys(("false", "no", "0"), "off")}


NonNegativeFloat = Annotated[float, BeforeValidator(_not_boolean), AfterValidator(_finite_at_least_zero)]

StrictInt = Annotated[int, BeforeValidator(_not_boolean)]

# Of counts, bytes and whole seconds. Redis and the operating system take them all.
MAX_WHOLE_NUMBER = 10**12

PositiveInt = Annotated[StrictInt, Field(ge=1, le=MAX_WHOLE_NUMBER)]

NonNegativeInt = Annotated[StrictInt, Field(ge=0, le=MAX_WHOLE_NUMBER)]

# No timeout and no interval is shorter: it would fail everything, or never let the process rest.
MIN_SECONDS = 0.01

# Of λ, dollars and dollars per second. Larger values are mistakes, and costs computed with them would be infinite.
MAX_AMOUNT = 1e12

Amount = Annotated[NonNegativeFloat, Field(le=MAX_AMOUNT)]

# 31 years. The operating system's timers do not take every number.
MAX_SECONDS = 10**9

Seconds = Annotated[NonNegativeFloat, Field(ge=MIN_SECONDS, le=MAX_SECONDS)]

TokenCost = Annotated[NonNegativeFloat, Field(le=MAX_PRICE)]

OffAutoOn = Annotated[Literal["off", "auto", "on"], BeforeValidator(_on_or_off)]

OffAuto = Annotated[Literal["off", "auto"], BeforeValidator(_on_or_off)]

OffCheapest = Annotated[Literal["off", "cheapest"], BeforeValidator(_on_or_off)]

OffObserveAdapt = Annotated[Literal["off", "observe", "adapt"], BeforeValidator(_on_or_off)]

NameList = Annotated[tuple[str, ...], BeforeValidator(split_list)]

APIList = Annotated[tuple[UpstreamAPI, ...], BeforeValidator(split_list), Field(min_length=1)]

EffortList = Annotated[Literal["auto"] | tuple[Effort, ...], BeforeValidator(read_efforts)]

ModelName = Annotated[str, AfterValidator(check_model_name)]


class FrozenModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, protected_namespaces=())


TIERED = "tiered_pricing"


def with_flat_tiers(stated: Mapping[str, Any]) -> Mapping[str, Any]:
    """Replace `tiered_pricing`, a list of prices by `range` of prompt tokens, by LiteLLM's flat names of prices.

    The first range's price is the model's own; a range begins above its lower bound. Anything else under that name is
    left alone.
    """
    tiers = _tiers(stated.get(TIERED))
    if not tiers:
        return stated
    rates = {rate for _, tier in tiers for rate in tier}
    flat = {name: value for name, value in stated.items() if name != TIERED}
    for place, (tokens, tier) in enumerate(tiers):
        for rate in rates:
            # tiers are not mixed: a rate that a tier leaves out is that of an ordinary token of the same tier
            usual = PRICE_FIELDS[1] if rate.startswith("output_") else PRICE_FIELDS[0]
            if (value := tier.get(rate, tier.get(usual))) is not None:
                flat[flat_price_field(rate, tokens if place else None)] = value
    return flat


def _tiers(listed: Any) -> list[tuple[int, dict[str, Any]]]:
    """Return lower bounds and rates, ascending; an empty list unless each has a range and an input price."""
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


class ModelInfo(FrozenModel):
    """What is known of a model, under LiteLLM's names. None: unknown. Prices are USD per token.

    Prices of tiers, such as `input_cost_per_token_above_200k_tokens`, have endlessly many names. They are kept as extra
    fields, and nothing else is.
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
    mode: Mode | None = None
    """What it is for. None: as litellm's price map says, else chat."""
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
    """Whether it accepts `stream_options`, which asks a stream for its usage. None: the first stream tells."""
    connect_timeout_s: Seconds | None = None
    first_token_timeout_s: Seconds | None = None
    idle_timeout_s: Seconds | None = None
    forward: Forward = "auto"
    """relay: OpenAI's format is passed through. translate: through litellm. auto: by the provider."""
    api: APIList | None = None
    """What its upstream speaks: chat, responses (OpenAI's), messages (Anthropic's), a name or a list. Clients of the
    same API are relayed, others translated. None: by the provider, at its own address alone."""
    effort: EffortList | None = None
    """auto, or a list of efforts and budgets of tokens: each is measured, and routed to as a model NAME@EFFORT. None:
    it is one model, and thinks as its caller says."""
    max_parallel_requests: PositiveInt | None = None
    """Per process. None: no cap."""
    max_queued_requests: Annotated[StrictInt, Field(ge=0, le=10_000)] | None = None
    """How many wait beyond these. None: as many as `max_parallel_requests`."""

    @property
    def prices(self) -> dict[str, float]:
        """Return the stated prices, each under one name."""
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
        if tiered.get("mode") == EMBEDDING and tiered.get(PRICE_FIELDS[0]) is not None:
            tiered.setdefault(PRICE_FIELDS[1], 0.0)  # nothing is written, and so nothing costs
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
        if self.effort is not None and self.supports_reasoning is False:
            raise ValueError("effort: a model that does not reason (supports_reasoning: false) has none; remove it")
        if self.free and any(self.prices.values()):
            raise ValueError("free: true and a price contradict each other; remove one")
        Price.from_fields({PRICE_FIELDS[0]: 0.0, PRICE_FIELDS[1]: 0.0, **self.prices})
        if len(self.prices) != sum(getattr(self, name) is not None for name in PRICE_FIELDS) + len(
            self.__pydantic_extra__
        ):
            raise ValueError("a price of a tier is stated twice, as in above_1k_tokens and above_1000_tokens")
        return self


class ModelConfig(FrozenModel):
    """One model of `model_list`. `litellm_params` reach the provider layer whole; repr hides the keys in them."""

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
        """Refuse parameters that would be accepted and have no effect. Raises ParamError.

        Records that are stored already are not checked: fewer names may have been known when they were stored.
        """
        check_effects(self.litellm_params, frozenset(ModelInfo.model_fields))
        if self.model_info.max_queued_requests is not None and self.model_info.max_parallel_requests is None:
            raise ParamError("model_info.max_queued_requests", " counts only with max_parallel_requests; state both")

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        params = {
            key: redact_value(key, value) for key, value in self.litellm_params.items() if key in ("model", "api_base")
        }
        return [("model_name", self.model_name), ("litellm_params", params), ("model_info", self.model_info)]
