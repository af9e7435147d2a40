from __future__ import annotations

import ipaddress
import logging
import re
import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PrivateAttr, SecretStr, ValidationError, model_validator

from proxy.settings.litellm_params import ParamError
from proxy.settings.model_config import (
    MAX_SECONDS,
    MAX_WHOLE_NUMBER,
    RESERVED_NAMES,
    Amount,
    FrozenModel,
    ModelConfig,
    ModelInfo,
    NameList,
    NonNegativeFloat,
    NonNegativeInt,
    OffAuto,
    OffAutoOn,
    OffCheapest,
    OffObserveAdapt,
    PositiveInt,
    Seconds,
    SettingsError,
    StrictInt,
    referred_variable,
)
from proxy.settings.redis_address import RedisAddress
from proxy.settings.sources import (
    Origins,
    environment_values,
    file_values,
    format_validation_error,
    unknown_key_error,
)
from router_core.types import PRICE_FIELDS, Price

log = logging.getLogger("uniroute.settings")


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Timeouts of one request, in seconds."""

    connect_s: float
    first_token_s: float
    """From calling a model to its first content; without a stream, to the whole response."""
    idle_s: float
    """Between two events of a stream, after the first content."""
    total_s: float
    """From the request's arrival to the first content of whichever model answers."""

    def stricter_than(self, configured: Timeouts) -> bool:
        """Return whether a model may miss one of these and still be well."""
        return self is not configured and any(
            getattr(self, name) < getattr(configured, name) for name in _TIMEOUT_NAMES
        )


_TIMEOUT_NAMES = tuple(column.name for column in fields(Timeouts))


@dataclass(frozen=True, slots=True)
class TimeoutOverrides:
    """The timeouts that one request states, in seconds. None: not stated."""

    connect_s: float | None = None
    first_token_s: float | None = None
    idle_s: float | None = None
    total_s: float | None = None


NO_OVERRIDES = TimeoutOverrides()


def total_timeout_s(settings: Settings, stated: TimeoutOverrides) -> float:
    """Return how long a request may wait in all: what it states, at most `request_timeout_s`."""
    return min(stated.total_s or settings.request_timeout_s, settings.request_timeout_s)


def timeouts_for(settings: Settings, info: ModelInfo, stated: TimeoutOverrides = NO_OVERRIDES) -> Timeouts:
    return Timeouts(
        connect_s=stated.connect_s or info.connect_timeout_s or settings.connect_timeout_s,
        first_token_s=stated.first_token_s or info.first_token_timeout_s or settings.first_token_timeout_s,
        idle_s=stated.idle_s or info.idle_timeout_s or settings.idle_timeout_s,
        total_s=total_timeout_s(settings, stated),
    )


# Seconds of at most a day. A millisecond of cooldown is as good as none.
Span = Annotated[NonNegativeFloat, Field(ge=0.001, le=86_400)]


class CircuitBreakerSettings(FrozenModel):
    """The setting `breaker`: when a model's circuit opens, and for how long.

    It opens once `failures` attempts within `window_s` seconds have failed, if these are at least `share` of the
    attempts that ended in that time. The cooldown is `cooldown_s`, doubled for each probe that fails, and never longer
    than `longest_cooldown_s`.
    """

    window_s: Span = Field(default=30, description="Seconds that the sliding window looks back.")
    failures: Annotated[StrictInt, Field(ge=1, le=10_000)] = Field(
        default=5,
        description=(
            "A model's circuit opens, and the model goes into cooldown, once this many attempts within the window "
            "have failed …"
        ),
    )
    share: Annotated[NonNegativeFloat, Field(gt=0, le=1)] = Field(
        default=0.5, description="… provided that they are at least this share of the attempts in the window."
    )
    cooldown_s: Span = Field(
        default=10, description="Seconds of the first cooldown. It doubles after each probe that fails."
    )
    longest_cooldown_s: Span = Field(
        default=300, description="Seconds that a cooldown lasts at most, whatever `retry-after` says."
    )

    @model_validator(mode="after")
    def _longest_is_longest(self) -> CircuitBreakerSettings:
        if self.longest_cooldown_s < self.cooldown_s:
            raise ValueError(
                f"longest_cooldown_s: must be at least cooldown_s, {self.cooldown_s:g}; got {self.longest_cooldown_s:g}"
            )
        return self


def _check_redis_url(value: str | None) -> str | None:
    if value is not None:
        RedisAddress.parse(value)
    return value


# Fields of RedisAddress that have a setting of their own: redis_username and so on.
_REDIS_FIELDS = ("username", "password", "sentinel_username", "sentinel_password", "ca_file", "cert_file", "key_file")


def _check_web_address(value: str | None) -> str | None:
    parts = urlsplit(value) if value is not None else None
    if parts is not None and not (parts.scheme in ("http", "https") and parts.hostname):
        raise ValueError("must start with http:// or https:// and name a host")
    return value


def _check_host_names(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if not re.fullmatch(r"[A-Za-z0-9._-]+(:\d+)?|\[[0-9A-Fa-f:.]+\](:\d+)?", value):
            raise ValueError(f"must be names of hosts, as proxy.example.com; got {value!r}")
    return values


def _check_origins(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if value != "null" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#*@A-Z]+", value):
            raise ValueError(f"must be origins as browsers write them, https://app.example.com; got {value!r}")
    return values


def _check_variables(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if value.startswith("UNIROUTE_") or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise ValueError(f"must be names of variables, none of them UNIROUTE_…; got {value!r}")
    return values


def _check_refresh(minutes: float) -> float:
    if 0 < minutes < 0.1:
        raise ValueError(f"must be 0, or 0.1 minutes or more; got {minutes:g}")
    return minutes


def _check_admin_key(value: SecretStr | None) -> SecretStr | None:
    if value is not None and len(value.get_secret_value()) < 8:
        raise ValueError("is too short to protect anything; use 8 characters or more")
    return value


AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]


class ProfileSettings(FrozenModel):
    """How a model is measured: how many validation prompts, for how much money, how many at once."""

    prompts: Annotated[StrictInt, Field(ge=1, le=1000)] = Field(
        default=60, description="Validation prompts that a new model is asked."
    )
    max_usd: Amount = Field(default=1.0, description="USD that measuring one model may cost.")
    concurrency: Annotated[StrictInt, Field(ge=1, le=64)] = Field(
        default=4, description="Validation prompts that are asked at the same time."
    )
    on_start: bool = Field(
        default=True, description="Measure the configured models that have no profile when the server starts."
    )
    timeout_s: Seconds = Field(default=120, description="Seconds that one validation answer may take.")
    keep_answers: bool = Field(
        default=True,
        description="Keep the beginning of each validation answer with its grade, to be read on the page.",
    )


class Preset(FrozenModel):
    """What a name that asks for routing stands for. None: nothing is stated."""

    lambda_: Amount | None = Field(default=None, alias="lambda")
    models: Annotated[NameList, Field(min_length=1)] | None = None
    max_cost_usd: Amount | None = None


# Of presets: `uniroute/NAME` and `claude-NAME` are model names.
_PRESET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

PRESET_PREFIX = "uniroute/"


class Settings(FrozenModel):
    """All settings of a server. To add one, add a field with its description, and run `make docs`."""

    model_list: tuple[ModelConfig, ...] = Field(
        default=(), description="The models, in LiteLLM's form. Only in the file."
    )
    lambda_: Amount = Field(
        default=0.1,
        alias="lambda",
        description="λ: the error that the reference price may buy. 0 asks for the best answer at any price.",
    )
    route_names: NameList = Field(
        default=("auto",),
        description="Model names that ask for routing. `*` stands for every name that is not registered.",
    )
    presets: dict[str, Preset] = Field(
        default={},
        description=(
            "Names of your own that ask for routing: `NAME: {lambda, models, max_cost_usd}` makes the model name "
            "`uniroute/NAME`; see [Presets](routing.md#presets). Only in the file."
        ),
    )
    housekeeping: OffCheapest = Field(
        default="cheapest",
        description=(
            "What agents and chat clients ask for themselves, as titles and summaries: `cheapest` sends it to the "
            "cheapest able model, `off` routes it as any request; see [Housekeeping](routing.md#housekeeping)."
        ),
    )
    trajectory: OffAuto = Field(
        default="auto",
        description=(
            "Whether a model is expected to err more while the run of an agent is stuck with it: its tools fail, its "
            "calls repeat, its edits are taken back; see [Trajectory](routing.md#trajectory)."
        ),
    )
    trajectory_weight: Annotated[NonNegativeFloat, Field(le=1)] = Field(
        default=0.75,
        description="The share of what a model is expected to get right that counts as errors once it is wholly stuck.",
    )
    latency_weight: Amount = Field(default=0.0, description="USD that one second of waiting is worth.")
    cost_unit: Literal["reference", "cents"] = Field(
        default="reference",
        description="What a cost of 1 is: the `reference` price of the request, or one US cent (`cents`).",
    )
    reference_price: Price = Field(
        default=Price(2.5e-6, 1e-5),
        description="`input_cost_per_token` and `output_cost_per_token`, in USD, that make a cost of 1.",
    )
    default_model: str | None = Field(
        default=None,
        description=(
            "The registered model that answers, with reason `degraded`, when a prompt cannot be assessed or no model "
            "is measured yet. Without one the model that is best on average answers; while none is measured the "
            "response is 503 with the progress and `retry-after`."
        ),
    )
    validation_set: str = Field(
        default="builtin", description="`builtin`, or the path of a JSONL file of your own validation prompts."
    )
    map: str = Field(
        default="builtin", description="The cluster map: `builtin`, or a folder that `uniroute fit` wrote."
    )
    embedder: str = Field(
        default="static",
        description=(
            "`static`, `multilingual` (needs `uniroute[multilingual]`), `transformer`, the folder of a "
            "sentence-transformers model, or the name of one in the Hugging Face cache (`hf download NAME`; the server "
            "downloads nothing). It must be the embedder that the map was fitted with; the built-in map comes for the "
            "first two."
        ),
    )
    recipe: Literal["pooled", "shrunk", "raw", "laplace"] = Field(
        default="pooled",
        description=(
            "How labels become error rates: `pooled` (all models together), `shrunk` (towards the model's mean), "
            "`raw` (the paper's), or `laplace`."
        ),
    )
    compiled: bool = Field(
        default=True,
        description=(
            "Whether routing computes with its compiled kernels, where they were built (`uniroute --version` says so). "
            "NumPy computes the same without them, in two to three times the time."
        ),
    )
    profile: ProfileSettings = Field(default=ProfileSettings(), description="How new models are measured.")
    judge_model: str | None = Field(
        default=None,
        description=(
            "The model that grades validation prompts of the type `judge`: a registered name, or LiteLLM's name."
        ),
    )
    allowed_env: Annotated[NameList, AfterValidator(_check_variables)] = Field(
        default=(),
        description=(
            "More variables that `os.environ/NAME` may refer to. Names that end in `_API_KEY` are always allowed."
        ),
    )
    allowed_hosts: Annotated[NameList, AfterValidator(_check_host_names)] = Field(
        default=(), description="More `Host` names that requests may use."
    )
    allowed_origins: Annotated[NameList, AfterValidator(_check_origins)] = Field(
        default=(), description="Origins of web pages that may call the server from a browser."
    )
    price_refresh_minutes: Annotated[NonNegativeFloat, AfterValidator(_check_refresh), Field(le=525_600)] = Field(
        default=0, description="Minutes between two fetches of the price feed, 0.1 or more. 0 turns it off."
    )
    price_url: Annotated[str | None, AfterValidator(_check_web_address)] = Field(
        default=None, repr=False, description="Address of the price feed. Without one, LiteLLM's price map."
    )
    max_body_bytes: PositiveInt = Field(default=20_000_000, description="Bytes of the largest request body.")
    max_answer_bytes: PositiveInt = Field(
        default=20_000_000,
        description="Bytes of the largest response, or event of a stream, that is read from a model.",
    )
    max_answers_in_flight_bytes: PositiveInt = Field(
        default=256_000_000,
        description=(
            "Bytes of responses larger than 64 KiB that one process holds at the same time, as received; parsed they "
            "take up to three times as much. Beyond it a large response becomes a 503 with `retry-after`."
        ),
    )
    sticky_sessions: OffAutoOn = Field(
        default="auto",
        description="Whether a session stays with its model; see [Conversations](routing.md#conversations).",
    )
    session_ttl_s: PositiveInt = Field(default=3600, description="Seconds that a session's model is remembered.")
    prompt_cache_s: Annotated[NonNegativeFloat, Field(le=MAX_SECONDS)] = Field(
        default=300, description="Seconds that a provider is assumed to keep a prompt in its cache."
    )
    response_ttl_s: PositiveInt = Field(
        default=2_592_000,
        description=(
            "Seconds that a response of `/v1/responses` is kept, unless its request has `store: false`. The default is "
            "OpenAI's 30 days, on which clients rely that continue a conversation by its id."
        ),
    )
    max_responses_per_key: PositiveInt = Field(
        default=1000, description="Responses kept for one client key; the oldest go first."
    )
    max_response_bytes: PositiveInt = Field(
        default=4_000_000, description="Bytes of the largest response that is kept, its whole input included."
    )
    max_stored_bytes_per_key: PositiveInt = Field(
        default=64_000_000, description="Bytes of all responses kept for one client key; the oldest go first."
    )
    fallback_attempts: Annotated[StrictInt, Field(ge=1, le=20)] = Field(
        default=3, description="Models that are asked, at most, until one begins to answer."
    )
    request_timeout_s: Seconds = Field(
        default=600,
        description=(
            "Seconds for all attempts of a request together: until the first content of a stream, or the whole of "
            "another response."
        ),
    )
    connect_timeout_s: Seconds = Field(default=5, description="Seconds to connect to a model.")
    first_token_timeout_s: Seconds = Field(
        default=300,
        description=(
            "Seconds from sending a request to a model until its first content; without streaming, until the whole "
            "response."
        ),
    )
    idle_timeout_s: Seconds = Field(
        default=120, description="Seconds between two events of a stream, once content has come."
    )
    stream_timeout_s: Seconds = Field(default=3600, description="Seconds that a stream may take in all.")
    keep_alive_s: Annotated[Seconds, Field(ge=0.1)] = Field(
        default=15,
        description=(
            "Seconds after which a stream without content gets its headers and a comment, and a silent stream another "
            "comment."
        ),
    )
    breaker: CircuitBreakerSettings = Field(
        default=CircuitBreakerSettings(), description="When a failing model goes into cooldown."
    )
    queue_wait_s: Annotated[NonNegativeFloat, Field(le=3600)] = Field(
        default=5, description="Seconds that a request waits in the queue of a model with `max_parallel_requests`."
    )
    reserve_output_tokens: PositiveInt = Field(
        default=4096, description="Tokens of a response that a budget reserves if the request sets no `max_tokens`."
    )
    clamp_max_tokens: OffAutoOn = Field(
        default="auto",
        description=(
            "Whether a `max_tokens` above a model's own limit is lowered to that limit: `auto` for routed names, `on` "
            "also for a model that is asked for by name, `off` never."
        ),
    )
    limits_timeout_s: Annotated[Seconds, Field(le=1)] = Field(
        default=0.05,
        description=(
            "Seconds that a request of a limited key waits for Redis, both before a model is asked and before its "
            "response ends."
        ),
    )
    limits_without_store: Literal["refuse", "allow"] = Field(
        default="refuse",
        description=(
            "Keys with a spend limit while Redis does not answer: `refuse` them with a 503, or `allow` them unchecked."
        ),
    )
    drain_s: Annotated[StrictInt, Field(ge=1, le=3600)] = Field(
        default=30,
        description="Seconds that open responses may go on after SIGTERM. Then they are cut off, and counted.",
    )
    decision_ttl_s: NonNegativeInt = Field(
        default=604_800,
        description="Seconds that the record of a decision is kept. 0 keeps none.",
    )
    max_decisions: NonNegativeInt = Field(
        default=20_000, description="Decisions that are kept in Redis; the oldest go first. 0 keeps none."
    )
    max_decision_bytes: PositiveInt = Field(
        default=64_000_000, description="Bytes of all decisions that are kept in Redis; the oldest go first."
    )
    max_decisions_per_s: PositiveInt = Field(
        default=100,
        description=(
            "Decisions that each process records within a second. Those of a faster flood are counted in "
            "`uniroute_decisions_skipped_total`, and not recorded: keeping them all would slow every request."
        ),
    )
    log_prompts: bool = Field(
        default=False,
        description=(
            "Whether the record of a decision holds the text that the model was chosen for, up to 4,000 characters of "
            "it."
        ),
    )
    feedback: OffObserveAdapt = Field(
        default="observe",
        description=(
            "What `POST /v1/feedback` does: `observe` counts it beside the measured profiles, `adapt` also routes by "
            "it, `off` refuses it."
        ),
    )
    feedback_half_life_s: Annotated[Seconds, Field(ge=60)] = Field(
        default=1_209_600, description="Seconds after which feedback counts half."
    )
    feedback_labels_per_key: Annotated[NonNegativeFloat, Field(gt=0, le=MAX_WHOLE_NUMBER)] = Field(
        default=20,
        description="Labels of one model and cluster that the feedback of one client key counts as, at most.",
    )
    feedback_per_minute: PositiveInt = Field(
        default=120, description="Calls of `POST /v1/feedback` in a minute that one client key may make."
    )
    log_format: Literal["auto", "json", "text"] = Field(
        default="auto",
        description=(
            "How log lines are written: `json`, `text`, or `auto`: text where standard error is a terminal, and JSON "
            "elsewhere."
        ),
    )
    usage_journal_max_bytes: PositiveInt = Field(
        default=256_000_000,
        description="Bytes of usage that a process keeps on disk while Redis is away. More is dropped, and counted.",
    )
    redis_url: Annotated[str | None, AfterValidator(_check_redis_url)] = Field(
        default=None,
        repr=False,
        description=(
            "Address of a Redis or Valkey; see [A Redis of your own](reliability.md#a-redis-of-your-own). Without one "
            "an embedded Valkey runs in `data_dir`."
        ),
    )
    redis_username: str | None = Field(
        default=None, description="User name for Redis, stated apart from the URL, where nothing needs to be escaped."
    )
    redis_password: SecretStr | None = Field(default=None, description="Password for Redis.")
    redis_sentinel_username: str | None = Field(default=None, description="User name for the sentinels themselves.")
    redis_sentinel_password: SecretStr | None = Field(
        default=None, description="Password for the sentinels themselves."
    )
    redis_ca_file: AbsolutePath | None = Field(
        default=None,
        description="File of the certificates that are trusted with `rediss://`. Without one, the system's.",
    )
    redis_cert_file: AbsolutePath | None = Field(
        default=None, description="File of our own certificate, for a Redis that asks for one."
    )
    redis_key_file: AbsolutePath | None = Field(default=None, description="File of its key, if that is another file.")
    admin_key: Annotated[SecretStr | None, AfterValidator(_check_admin_key)] = Field(
        default=None, description="Key of the admin API, at least 8 characters. Without one there is no admin API."
    )
    data_dir: Annotated[AbsolutePath, Field(validate_default=True)] = Field(
        default=Path("~/.local/share/uniroute"),
        description=(
            "Folder of the embedded store, the embedding table and the usage journals; closed to other users (mode "
            "0700)."
        ),
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: Annotated[StrictInt, Field(ge=0, le=65535)] = Field(default=8000, description="Port to listen on.")
    workers: Annotated[StrictInt, Field(ge=1, le=256)] = Field(default=1, description="Processes that share the port.")
    worker_health_timeout_s: Annotated[Seconds, Field(ge=1)] = Field(
        default=30, description="Seconds without a sign of life after which a worker is killed and another started."
    )

    _origins: Origins = PrivateAttr(default=Origins())

    def origin(self, setting: str) -> str:
        """Return the variable, the option, or the file and key that states a setting; else the setting's own name."""
        return self._origins.name(setting)

    def refusal(self, message: str) -> SettingsError:
        """Return the error for a message `SETTING: what is wrong`, which names where the setting was stated."""
        return SettingsError(self._origins.located(message))

    @property
    def redis_address(self) -> RedisAddress | None:
        """Return the URL merged with the other settings of Redis. None: the embedded store."""
        return None if self.redis_url is None else RedisAddress.parse(self.redis_url, self._stated_of_redis())

    def _stated_of_redis(self) -> dict[str, str]:
        stated = ((name, getattr(self, f"redis_{name}")) for name in _REDIS_FIELDS)
        return {
            name: value.get_secret_value() if isinstance(value, SecretStr) else str(value)
            for name, value in stated
            if value is not None
        }

    @model_validator(mode="after")
    def _redis_settings_fit_together(self) -> Settings:
        try:
            _ = self.redis_address
        except ValueError as error:
            raise ValueError(f"redis_url: {error}") from None
        return self

    @model_validator(mode="after")
    def _keys_may_be_used(self) -> Settings:
        for number, entry in enumerate(self.model_list):
            try:
                entry.check_effects()
            except ParamError as refusal:
                raise ValueError(f"model_list[{number}].{refusal}") from None
            for key, value in entry.litellm_params.items():
                for path, text in [(key, value), *((f"{key}.{name}", inner) for name, inner in _items(value))]:
                    try:
                        referred_variable(text, self.allowed_env)
                    except SettingsError as refusal:
                        raise ValueError(f"model_list[{number}].litellm_params.{path}: {refusal}") from None
        return self

    @model_validator(mode="after")
    def _names_fit_together(self) -> Settings:
        seen: set[str] = set()
        for entry in self.model_list:
            if entry.model_name in seen:
                raise ValueError(
                    f"model_list: the name {entry.model_name!r} is given twice; one name is one arm with its own error"
                    " profile, so give each deployment its own name"
                )
            seen.add(entry.model_name)
        if "*" not in self.route_names and (taken := seen.intersection(self.route_names)):
            raise ValueError(f"route_names: {sorted(taken)[0]!r} is also a model; a name either routes or is a model")
        if self.default_model in RESERVED_NAMES or self.default_model in self.route_names:
            raise ValueError(
                f"default_model: {self.default_model!r} asks for routing; name the model that is to answer"
            )
        for name, preset in self.presets.items():
            _check_preset(name, preset, seen, self.route_names)
        return self


def _check_preset(name: str, preset: Preset, models: Collection[str], route_names: Collection[str]) -> None:
    """Raise ValueError for a name that cannot be one, or that stands for something else."""
    if not _PRESET_NAME.fullmatch(name):
        raise ValueError(f"presets: a name is 1 to 64 of A-Z a-z 0-9 . _ - and begins with none of . _ -; got {name!r}")
    model = f"{PRESET_PREFIX}{name}"
    if model in RESERVED_NAMES:
        raise ValueError(f"presets: {model!r} has a meaning of its own; give the preset another name")
    if model in models:
        raise ValueError(f"presets: {model!r} is also a model; a name either routes or is a model")
    if name in route_names or model in route_names:
        raise ValueError(f"presets: {name!r} is also one of route_names; give the preset another name")
    for each in preset.models or ():
        if each in RESERVED_NAMES or each.startswith(PRESET_PREFIX):
            raise ValueError(f"presets.{name}.models: {each!r} asks for routing; list models")


def _items(value: object) -> list[tuple[str, object]]:
    return [(str(name), inner) for name, inner in value.items()] if isinstance(value, Mapping) else []


def _nested_settings() -> dict[str, Collection[str]]:
    """Return the settings that are mappings, with their keys."""
    return {
        "profile": ProfileSettings.model_fields,
        "reference_price": PRICE_FIELDS,
        "breaker": CircuitBreakerSettings.model_fields,
        "presets": [field.alias or name for name, field in Preset.model_fields.items()],
    }


_ONLY_IN_THE_FILE = frozenset({"model_list", "presets"})


def _variable_paths() -> dict[str, tuple[str, ...]]:
    """Return the variable of each setting, without the prefix: PROFILE_PROMPTS → ("profile", "prompts")."""
    nested = _nested_settings()
    paths: dict[str, tuple[str, ...]] = {}
    for name in setting_names():
        if name in _ONLY_IN_THE_FILE:
            continue
        if name in nested:
            paths |= {f"{name}_{key}".upper(): (name, key) for key in nested[name]}
        else:
            paths[name.upper()] = (name,)
    return paths


def setting_names() -> tuple[str, ...]:
    """Return the settings as they are written in YAML: `lambda`, not `lambda_`."""
    return tuple(field.alias or name for name, field in Settings.model_fields.items())


def load_settings(
    config: Path | None, environ: Mapping[str, str], overrides: Mapping[str, object] | None = None
) -> Settings:
    """Read the file, the environment and `overrides` (the command line); the later wins. Raises SettingsError."""
    names = setting_names()
    values: dict[str, Any] = file_values(config, names, ModelInfo.model_fields) if config else {}
    in_file = frozenset(values)
    elsewhere: dict[tuple[str, ...], str] = {}
    if environ.get("XDG_DATA_HOME") and "data_dir" not in values:
        values["data_dir"] = Path(environ["XDG_DATA_HOME"]) / "uniroute"
        elsewhere["data_dir",] = "XDG_DATA_HOME"
    for keys, (variable, value) in environment_values(environ, _variable_paths()).items():
        _set(values, keys, value)
        elsewhere[keys] = variable
    for key, option in (overrides or {}).items():
        if key not in names:
            raise unknown_key_error("command line", key, names)
        if option is not None:
            values[key] = option
            elsewhere[key,] = f"--{key.replace('_', '-')}"
    origins = Origins(config, in_file, elsewhere)
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError(format_validation_error(error, origins, _nested_settings())) from None
    settings._origins = origins
    if settings.redis_url is None:
        for name in (name for name in _REDIS_FIELDS if getattr(settings, f"redis_{name}") is not None):
            log.warning("%s goes with redis_url, which is not set: it is ignored", settings.origin(f"redis_{name}"))
    return settings


def _set(values: dict[str, Any], keys: tuple[str, ...], value: object) -> None:
    *parents, last = keys
    for parent in parents:
        inner = values.get(parent)
        values[parent] = dict(inner) if isinstance(inner, dict) else {}
        values = values[parent]
    values[last] = value


def check_exposure(settings: Settings, *, keys_required: bool) -> None:
    """Refuse to listen beyond this machine while anyone may call.

    Args:
        keys_required: whether a client key was ever made, without which everybody is let in.

    Raises:
        SettingsError: the host is not the loopback, and no key is required.
    """
    if not (keys_required or is_loopback(settings.host)):
        raise settings.refusal(
            f"host: listening on {settings.host!r} is open to others, and no client key exists; make one with"
            " `uniroute keys create NAME`, or listen on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip(string.whitespace + "[]")).is_loopback
    except ValueError:
        return host == "localhost"
