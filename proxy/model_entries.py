"""A model as a configuration file or an administrator states it: how it is reached, and what is known of it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from proxy.litellm_params import ParamError, check_effects, check_shapes
from proxy.price_fields import with_flat_tiers
from proxy.redaction import shown
from proxy.setting_types import Count, Forward, Frozen, ModelName, Seconds, TokenCost, Whole
from router_core.types import PRICE_FIELDS, Price, flat_price_field, price_field

__all__ = ["ModelEntry", "ModelInfo"]


class ModelInfo(Frozen):
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
    max_input_tokens: Count | None = None
    max_output_tokens: Count | None = None
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
    max_parallel_requests: Count | None = None
    """Of one process. None: no cap."""
    max_queued_requests: Annotated[Whole, Field(ge=0, le=10_000)] | None = None
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
        Price.of({PRICE_FIELDS[0]: 0.0, PRICE_FIELDS[1]: 0.0, **self.prices})
        if len(self.prices) != sum(getattr(self, name) is not None for name in PRICE_FIELDS) + len(
            self.__pydantic_extra__
        ):
            raise ValueError("a price of a tier is stated twice, as in above_1k_tokens and above_1000_tokens")
        return self


class ModelEntry(Frozen):
    """One model of `model_list`. `litellm_params` reach the provider layer whole; keys in them are never shown."""

    model_name: ModelName
    litellm_params: dict[str, Any]
    model_info: ModelInfo = ModelInfo()

    @model_validator(mode="after")
    def _names_a_model(self) -> ModelEntry:
        model = self.litellm_params.get("model")
        if not isinstance(model, str) or not model:
            raise ValueError("litellm_params needs `model`, as in openai/gpt-4.1-mini")
        check_shapes(self.litellm_params)
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
