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

from pydantic import AfterValidator, Field, SecretStr, ValidationError, model_validator

from proxy.settings.litellm_params import ParamError
from proxy.settings.models import (
    RESERVED_NAMES,
    FrozenModel,
    ModelConfig,
    ModelInfo,
    NameList,
    NonNegativeFloat,
    OffAutoOn,
    PositiveInt,
    Seconds,
    SettingsError,
    StrictInt,
    referred_variable,
)
from proxy.settings.redis_address import RedisAddress
from proxy.settings.sources import environment_values, file_values, format_validation_error, unknown_key_error
from router_core.types import PRICE_FIELDS, Price


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
        return self is not configured and any(getattr(self, name) < getattr(configured, name) for name in _NAMES)


_NAMES = tuple(column.name for column in fields(Timeouts))


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


Span = Annotated[NonNegativeFloat, Field(gt=0, le=86_400)]


class CircuitBreakerSettings(FrozenModel):
    """The setting `breaker`. A model rests once `failures` attempts within `window_s` seconds have failed, if they are
    at least `share` of the attempts that ended in that time. It rests for `cooldown_s`, doubled for each probe that
    fails, and never longer than `longest_cooldown_s`."""

    window_s: Span = 30
    failures: Annotated[StrictInt, Field(ge=1, le=10_000)] = 5
    share: Annotated[NonNegativeFloat, Field(gt=0, le=1)] = 0.5
    cooldown_s: Span = 10
    longest_cooldown_s: Span = 300

    @model_validator(mode="after")
    def _longest_is_longest(self) -> CircuitBreakerSettings:
        if self.longest_cooldown_s < self.cooldown_s:
            raise ValueError(
                f"longest_cooldown_s: must be at least cooldown_s, {self.cooldown_s:g}; got {self.longest_cooldown_s:g}"
            )
        return self


def _redis_url(value: str | None) -> str | None:
    if value is not None:
        RedisAddress.parse(value)
    return value


log = logging.getLogger("uniroute.settings")

# Fields of RedisAddress that have a setting of their own: redis_username and so on.
_REDIS = ("username", "password", "sentinel_username", "sentinel_password", "ca_file", "cert_file", "key_file")


def _web_address(value: str | None) -> str | None:
    parts = urlsplit(value) if value is not None else None
    if parts is not None and not (parts.scheme in ("http", "https") and parts.hostname):
        raise ValueError("must start with http:// or https:// and name a host")
    return value


def _host_names(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if not re.fullmatch(r"[A-Za-z0-9._-]+(:\d+)?|\[[0-9A-Fa-f:.]+\](:\d+)?", value):
            raise ValueError(f"must be names of hosts, as proxy.example.com; got {value!r}")
    return values


def _pages(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if value != "null" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#*@A-Z]+", value):
            raise ValueError(f"must be origins as browsers write them, https://app.example.com; got {value!r}")
    return values


def _variables_of_others(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if value.startswith("UNIROUTE_") or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise ValueError(f"must be names of variables, none of them UNIROUTE_…; got {value!r}")
    return values


AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]


class ProfileSettings(FrozenModel):
    """How a model is measured: how many validation prompts, for how much money, how many at once."""

    prompts: Annotated[StrictInt, Field(ge=1, le=1000)] = 60
    max_usd: NonNegativeFloat = 1.0
    concurrency: Annotated[StrictInt, Field(ge=1, le=64)] = 4
    on_start: bool = True
    timeout_s: Seconds = 120


class Settings(FrozenModel):
    model_list: tuple[ModelConfig, ...] = ()
    lambda_: NonNegativeFloat = Field(default=0.1, alias="lambda")
    route_names: NameList = ("auto",)
    latency_weight: NonNegativeFloat = 0.0
    cost_unit: Literal["reference", "cents"] = "reference"
    reference_price: Price = Price(2.5e-6, 1e-5)
    default_model: str | None = None
    validation_set: str = "builtin"
    map: str = "builtin"
    embedder: str = "static"
    recipe: Literal["pooled", "shrunk", "raw", "laplace"] = "pooled"
    profile: ProfileSettings = ProfileSettings()
    judge_model: str | None = None
    allowed_env: Annotated[NameList, AfterValidator(_variables_of_others)] = ()
    allowed_hosts: Annotated[NameList, AfterValidator(_host_names)] = ()
    allowed_origins: Annotated[NameList, AfterValidator(_pages)] = ()
    price_refresh_minutes: NonNegativeFloat = 0
    price_url: Annotated[str | None, AfterValidator(_web_address)] = Field(default=None, repr=False)
    max_body_bytes: PositiveInt = 20_000_000
    max_answer_bytes: PositiveInt = 20_000_000
    max_answers_in_flight_bytes: PositiveInt = 256_000_000
    sticky_sessions: OffAutoOn = "auto"
    session_ttl_s: PositiveInt = 3600
    prompt_cache_s: NonNegativeFloat = 300
    fallback_attempts: Annotated[StrictInt, Field(ge=1, le=20)] = 3
    request_timeout_s: Seconds = 600
    connect_timeout_s: Seconds = 5
    first_token_timeout_s: Seconds = 300
    idle_timeout_s: Seconds = 120
    stream_timeout_s: Seconds = 3600
    keep_alive_s: Seconds = 15
    breaker: CircuitBreakerSettings = CircuitBreakerSettings()
    queue_wait_s: Annotated[NonNegativeFloat, Field(le=3600)] = 5
    reserve_output_tokens: PositiveInt = 4096
    clamp_max_tokens: OffAutoOn = "auto"
    """Whether a limit of an answer above a model's own is lowered to that. auto: where the model is routed."""
    limits_timeout_s: Annotated[NonNegativeFloat, Field(gt=0, le=1)] = 0.05
    limits_without_store: Literal["refuse", "allow"] = "refuse"
    drain_s: Annotated[StrictInt, Field(ge=1, le=3600)] = 30
    usage_journal_max_bytes: PositiveInt = 256_000_000
    redis_url: Annotated[str | None, AfterValidator(_redis_url)] = Field(default=None, repr=False)
    redis_username: str | None = None
    redis_password: SecretStr | None = None
    redis_sentinel_username: str | None = None
    redis_sentinel_password: SecretStr | None = None
    redis_ca_file: AbsolutePath | None = None
    redis_cert_file: AbsolutePath | None = None
    redis_key_file: AbsolutePath | None = None
    admin_key: SecretStr | None = None
    data_dir: Annotated[AbsolutePath, Field(validate_default=True)] = Path("~/.local/share/uniroute")
    host: str = "127.0.0.1"
    port: Annotated[StrictInt, Field(ge=0, le=65535)] = 8000
    workers: Annotated[StrictInt, Field(ge=1, le=256)] = 1
    worker_health_timeout_s: Seconds = 30

    @property
    def redis_address(self) -> RedisAddress | None:
        """Return the URL merged with the other settings of Redis. None: the embedded store."""
        return None if self.redis_url is None else RedisAddress.parse(self.redis_url, self._stated_of_redis())

    def _stated_of_redis(self) -> dict[str, str]:
        stated = ((name, getattr(self, f"redis_{name}")) for name in _REDIS)
        return {
            name: value.get_secret_value() if isinstance(value, SecretStr) else str(value)
            for name, value in stated
            if value is not None
        }

    @model_validator(mode="after")
    def _redis_settings_fit_together(self) -> Settings:
        stated = self._stated_of_redis()
        if self.redis_url is None and stated:
            log.warning("redis_%s goes with redis_url, which is not set: it is ignored", next(iter(stated)))
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
        if self.admin_key is not None and len(self.admin_key.get_secret_value()) < 8:
            raise ValueError("admin_key: is too short to protect anything; use 8 characters or more")
        return self


def _items(value: object) -> list[tuple[str, object]]:
    return [(str(name), inner) for name, inner in value.items()] if isinstance(value, Mapping) else []


def _nested() -> dict[str, Collection[str]]:
    """Return the settings that are mappings, with their keys."""
    return {
        "profile": ProfileSettings.model_fields,
        "reference_price": PRICE_FIELDS,
        "breaker": CircuitBreakerSettings.model_fields,
    }


def _variables() -> dict[str, tuple[str, ...]]:
    """Return the variable of each setting, without the prefix: PROFILE_PROMPTS → ("profile", "prompts")."""
    nested = _nested()
    paths: dict[str, tuple[str, ...]] = {}
    for name in setting_names():
        if name in nested:
            paths |= {f"{name}_{key}".upper(): (name, key) for key in nested[name]}
        elif name != "model_list":
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
    if environ.get("XDG_DATA_HOME"):
        values.setdefault("data_dir", Path(environ["XDG_DATA_HOME"]) / "uniroute")
    _merge(values, environment_values(environ, _variables()))
    for key, value in (overrides or {}).items():
        if key not in names:
            raise unknown_key_error("command line", key, names)
        if value is not None:
            values[key] = value
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError(format_validation_error(error, config, _nested())) from None


def _merge(values: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            values[key] = {**values[key], **value}
        else:
            values[key] = value


def check_exposure(settings: Settings, *, keys_required: bool) -> None:
    """Refuse to listen beyond this machine while anyone may call.

    Args:
        keys_required: whether a client key was ever made, without which everybody is let in.

    Raises:
        SettingsError: the host is not the loopback, and no key is required.
    """
    if not (keys_required or is_loopback(settings.host)):
        raise SettingsError(
            f"host: listening on {settings.host!r} is open to others, and no client key exists; make one with"
            " `uniroute keys create NAME`, or listen on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip(string.whitespace + "[]")).is_loopback
    except ValueError:
        return host == "localhost"
