from __future__ import annotations

import difflib
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import ValidationError

from proxy.errors import BadRequest, ModelNotFound
from proxy.profiling.job import Job
from proxy.server.dependencies import AppState
from proxy.settings.litellm_params import ParamError, is_model_info_of_litellm, is_provider_param
from proxy.settings.models import ModelConfig, SettingsError, check_model_name, resolve_secret
from proxy.settings.outbound import OutboundError, ssl_context, trust_of
from proxy.settings.redaction import FoundSecret, find_secrets, is_reference, redact_value
from proxy.settings.schema import ProfileSettings, Settings
from proxy.storage.client_keys import LIMITS, ClientKey, KeyChange
from proxy.storage.models import CurrentPrice, ModelRecord
from proxy.storage.redis import StoreUnavailable, is_unix_time
from proxy.storage.snapshot import RoutingSnapshot
from proxy.upstream.key_scope import ADDRESSES, check_secrets_stay
from router_core.clustering import ClusterMap
from router_core.profiles import Profile
from router_core.types import PRICE_FIELDS, Price, price_field

_PROSE = ("model", "system")

_ADD = ("model_name", "litellm_params", "model_info", "profile")

_PATCH = ("litellm_params", "model_info")


@dataclass(frozen=True)
class ProfileRequest:
    """Measure by asking the model so many prompts for so much money."""

    prompts: int
    max_usd: float


@dataclass(frozen=True)
class NewModel:
    record: ModelRecord
    profile: ProfileRequest | Profile


def read_addition(
    body: Mapping[str, Any], settings: Settings, environ: Mapping[str, str], cluster_map: ClusterMap, now: float
) -> NewModel:
    """Raises BadRequest, or InvalidProfile, naming the field."""
    reject_unknown_keys(body, _ADD, "")
    name = body.get("model_name")
    if name in settings.route_names:
        raise BadRequest(f"{name!r} is one of route_names: it asks for routing", param="model_name")
    entry = _entry(name, body.get("litellm_params"), body.get("model_info"))
    _check_params(entry, settings, environ)
    profile = read_profile(body.get("profile"), settings, cluster_map)
    return NewModel(ModelRecord.of_entry(entry, "admin", now), profile)


def read_patch(
    body: Mapping[str, Any], record: ModelRecord, settings: Settings, environ: Mapping[str, str]
) -> ModelRecord:
    """Stated fields replace, null removes; what is not stated stays. Raises BadRequest."""
    reject_unknown_keys(body, _PATCH, "")
    stated = _object(body.get("litellm_params"), "litellm_params")
    params = _merged(record.litellm_params, stated)
    info = _merged(record.info.model_dump(exclude_defaults=True), _object(body.get("model_info"), "model_info"))
    entry = _entry(record.name, params, info)
    _check_params(entry, settings, environ)
    changed = ModelRecord.of_entry(entry, record.source, record.created_at)
    check_secrets_stay(record, changed, stated)
    return changed


def read_profile(stated: Any, settings: Settings, cluster_map: ClusterMap) -> ProfileRequest | Profile:
    """A ready profile where it has `errors` or `error_sums`, else how to ask."""
    document = _object(stated, "profile")
    if "errors" in document or "error_sums" in document:
        profile = Profile.from_json(document)
        if profile.map_id != cluster_map.id:
            raise BadRequest(
                f"the profile was measured on map {profile.map_id}, this server uses {cluster_map.id}", param="profile"
            )
        if profile.labels.size != cluster_map.size:
            raise BadRequest(
                f"the profile has {profile.labels.size} clusters, the map {cluster_map.size}", param="profile"
            )
        return profile
    reject_unknown_keys(document, ("prompts", "max_usd"), "profile.")
    defaults = settings.profile
    try:
        asked = ProfileSettings(
            prompts=document.get("prompts", defaults.prompts), max_usd=document.get("max_usd", defaults.max_usd)
        )
    except ValidationError as error:
        raise _invalid(error, "profile.") from None
    return ProfileRequest(asked.prompts, asked.max_usd)


def read_price(body: Mapping[str, Any]) -> Price:
    """The whole price. Raises BadRequest, or InvalidPrice, naming the field."""
    reject_unknown_keys({name: None for name in body if price_field(name) is None}, PRICE_FIELDS, "")
    stated = {name: value for name, value in body.items() if value is not None}
    for name, value in stated.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BadRequest(f"`{name}` must be a number of USD per token; got {value!r}"[:200], param=name)
    for name in PRICE_FIELDS[:2]:
        if name not in stated:
            raise BadRequest(f"`{name}` is missing: a price replaces the whole price before it", param=name)
    try:
        return Price.from_fields({name: float(value) for name, value in stated.items()})
    except OverflowError:
        raise BadRequest("a price must be a finite number of USD per token") from None


def redact_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """litellm_params without secrets: references to the environment are shown, literal keys and headers are not."""
    return {name: redact_value(name, value) for name, value in params.items()}


def _entry(name: Any, params: Any, info: Any) -> ModelConfig:
    stated = {key: value for key, value in _object(info, "model_info").items() if not is_model_info_of_litellm(key)}
    document = {"model_name": name, "litellm_params": params, "model_info": stated}
    try:
        return ModelConfig.model_validate(document)
    except ValidationError as error:
        raise _invalid(error, "") from None


def _check_params(entry: ModelConfig, settings: Settings, environ: Mapping[str, str]) -> None:
    params = entry.litellm_params
    try:
        entry.check_effects()
        if (trusted := params.get("ssl_verify")) is not None and not is_reference(trusted):
            ssl_context(trust_of(trusted, environ), environ)
    except ParamError as error:
        raise BadRequest(str(error), param=error.param) from None
    except OutboundError as error:
        raise BadRequest(f"`litellm_params.ssl_verify`: {error}", param="litellm_params.ssl_verify") from None
    for name in ADDRESSES:
        _check_address(name, params.get(name))
    for name, value in params.items():
        if is_provider_param(name):
            _check_references(f"litellm_params.{name}", value, settings, environ)
        if name not in _PROSE:
            for literal in find_secrets(name, value):
                raise _stored(name, literal)


def _check_references(param: str, value: Any, settings: Settings, environ: Mapping[str, str]) -> None:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_references(f"{param}.{name}", inner, settings, environ)
    elif is_reference(value):
        try:
            resolve_secret(value, environ, settings.allowed_env)
        except SettingsError as error:
            raise BadRequest(f"`{param}`: {error}", param=param) from None


def _stored(name: str, literal: FoundSecret) -> BadRequest:
    """What is written out would be in Redis, in its backups, and before everyone who may read models."""
    param = f"litellm_params.{literal.path}"
    if is_provider_param(name) and name not in ADDRESSES:
        fix = f"`{param}` must name a variable of the server's environment, as os.environ/NAME_API_KEY"
    else:
        fix = f"`{param}` looks like a secret: state it in `extra_headers`, as os.environ/NAME_API_KEY"
    return BadRequest(f"{fix}; a literal key would be stored", param=param)


def _check_address(name: str, address: Any) -> None:
    if address is None or (is_reference(address)):
        return
    try:
        parts = urlsplit(address) if isinstance(address, str) else None
        good = parts is not None and parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.username
    except ValueError:
        good = False
    if not good:
        raise BadRequest(
            f"`litellm_params.{name}` must be an http or https address without a user name",
            param=f"litellm_params.{name}",
        )


def _object(value: Any, param: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise BadRequest(f"`{param}` must be an object", param=param)
    return value


def _merged(before: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**before, **stated}.items() if value is not None}


def reject_unknown_keys(body: Mapping[str, Any], known: Collection[str], prefix: str) -> None:
    for name in body:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `{prefix}{near[0]}`?" if near else f"known are {', '.join(known)}"
            raise BadRequest(f"`{prefix}{name[:60]}` is not known here; {hint}", param=f"{prefix}{name[:60]}")


def _invalid(error: ValidationError, prefix: str) -> BadRequest:
    problem = error.errors(include_url=False, include_input=False)[0]
    path = prefix + ".".join(map(str, problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ")
    return BadRequest(f"`{path}`: {message}" if path else message, param=path or None)


_PLAIN = ("lambda_default", "lambda_min", "lambda_max")

_EXPIRY = ("expires_at", "expires_in_s")

FIELDS = ("name", "models", "role", *_EXPIRY, *_PLAIN, *LIMITS)

MAX_EXPIRY_S = 100 * 365 * 86_400

MAX_GRACE_S = 30 * 86_400

_MAX_NAME = 200


def read_new_key(body: Mapping[str, Any], now: float) -> tuple[str, KeyChange]:
    """The name, and the rest. Raises BadRequest. What a ClientKey refuses is left to it."""
    stated = read_key_change({"name": None, **body}, now)
    expires_at = stated.fields.get("expires_at")
    if expires_at is not None and expires_at <= now:
        given = next(name for name in _EXPIRY if name in body)
        raise BadRequest(f"`{given}` is in the past: the key would open nothing", param=given)
    return stated.fields["name"], stated


def read_key_change(body: Mapping[str, Any], now: float) -> KeyChange:
    """Stated fields replace, null removes; what is not stated stays. `now`: Unix seconds. Raises BadRequest."""
    reject_unknown_keys(body, FIELDS, "")
    fields: dict[str, Any] = {name: body[name] for name in _PLAIN if name in body}
    if "name" in body:
        fields["name"] = _name(body["name"])
    if "models" in body:
        fields["models"] = _models(body["models"])
    if "role" in body:
        fields["role"] = "client" if body["role"] is None else body["role"]
    if any(name in body for name in _EXPIRY):
        fields["expires_at"] = _expiry(body, now)
    return KeyChange(fields, {name: body[name] for name in LIMITS if name in body})


def parse_grace_period(body: Mapping[str, Any]) -> float:
    """Seconds. Raises BadRequest."""
    reject_unknown_keys(body, ("grace_s",), "")
    return _seconds(body.get("grace_s", 0), "grace_s", MAX_GRACE_S)


def key_to_json(key: ClientKey) -> dict[str, Any]:
    """All but the digests; the same names as in a body."""
    return {
        "id": key.id,
        "name": key.name,
        "role": key.role,
        "models": None if key.models is None else list(key.models),
        "created_at": _rfc3339_or_none(key.created_at),
        "expires_at": _rfc3339_or_none(key.expires_at),
        "revoked": key.revoked,
        **{name: getattr(key, name) for name in _PLAIN},
        **{name: getattr(key.limits, name) for name in LIMITS},
        "previous_secret_until": _rfc3339_or_none(key.previous_until),
    }


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > _MAX_NAME or not value.isprintable():
        raise BadRequest(f"`name` must say whose key it is, in 1 to {_MAX_NAME} printable characters", param="name")
    return value


def _models(value: Any) -> tuple[str, ...] | None:
    """A model may be added after the key that allows it; a name that no model can have is a slip."""
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise BadRequest("`models` must be a list of model names with at least one, or null for all", param="models")
    try:
        return tuple(dict.fromkeys(map(check_model_name, value)))
    except ValueError as error:
        raise BadRequest(f"`models`: {error}"[:300], param="models") from None


def _expiry(body: Mapping[str, Any], now: float) -> float | None:
    at, in_s = (body.get(name) for name in _EXPIRY)
    if at is not None and in_s is not None:
        raise BadRequest("state `expires_at` or `expires_in_s`, not both", param="expires_at")
    if in_s is not None:
        return now + _seconds(in_s, "expires_in_s", MAX_EXPIRY_S)
    return None if at is None else _time(at)


def _time(value: Any) -> float:
    try:
        at = datetime.fromisoformat(value) if isinstance(value, str) else None
        if at is not None and at.tzinfo is not None and is_unix_time(at.timestamp()):
            return at.timestamp()
    except (ValueError, OverflowError):
        pass
    example = "2027-01-31T00:00:00Z"
    raise BadRequest(
        f"`expires_at` must be an RFC 3339 time with its zone, as {example}; got {value!r}"[:200], param="expires_at"
    )


def _seconds(value: Any, name: str, most: int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise BadRequest(f"`{name}` must be seconds from 0 to {most}; got {value!r}"[:200], param=name)
    return float(value)


def _rfc3339_or_none(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    except (OverflowError, ValueError):  # beyond the year 9999: stored by another program
        return "9999-12-31T23:59:59Z"


Known = TypeVar("Known")


async def models_to_json(services: AppState) -> list[dict[str, Any]]:
    """A card of every model, by name, without the profile's figures."""
    state = services.state.current
    jobs = await _known(services, services.jobs.latest) or {}
    cards = [_card(state, name, jobs.get(name), with_profile=False) for name in sorted(state.models)]
    return [{**card, "health": services.health.status(card["model_name"])} for card in cards]


async def model_to_json(services: AppState, name: str, *, with_profile: bool) -> dict[str, Any]:
    job = await _known(services, lambda: services.jobs.for_model(name))
    state = services.state.current
    if name not in state.models:
        raise ModelNotFound(f"the model {name!r} was removed just now", param="model")
    return {**_card(state, name, job, with_profile=with_profile), "health": services.health.status(name)}


def _card(state: RoutingSnapshot, name: str, job: Job | None, *, with_profile: bool) -> dict[str, Any]:
    record = state.models[name]
    standing, why = _standing(state, record, job)
    profile = state.profiles.get(name)
    card: dict[str, Any] = {
        "model_name": name,
        "litellm_params": redact_params(record.litellm_params),
        "model_info": record.info.model_dump(exclude_defaults=True),
        "source": record.source,
        "created_at": _rfc3339(record.created_at),
        "state": standing,
        "why": why,
        "warning": None if profile is None else state.measuring_doubt,
        "price": _price(state.prices.get(name)),
        "job": None if job is None else job.to_json(),
    }
    if with_profile:
        card["profile"] = None if profile is None else profile.to_json(state.pool.errors[state.pool.index[name]])
    elif profile is not None:
        card["mean_error"], card["measured_at"] = profile.mean_error, profile.measured_at
    return card


def _standing(state: RoutingSnapshot, record: ModelRecord, job: Job | None) -> tuple[str, str | None]:
    """And why, where it is not measured as it is now."""
    standing, why = state.standing(record.name), state.set_aside.get(record.name)
    if standing not in ("unprofiled", "foreign_profile") or job is None:
        return standing, why
    if job.unfinished:
        return "profiling", why
    failed = job.state == "failed" and job.fingerprint in ("", record.fingerprint)
    return ("failed", job.error) if failed else (standing, why)


async def _known(services: AppState, ask: Callable[[], Awaitable[Known]]) -> Known | None:
    """None while Redis is away: reading models needs no jobs, and does not wait for them."""
    if not services.state.available:
        return None
    try:
        return await ask()
    except StoreUnavailable:
        return None


def _price(live: CurrentPrice | None) -> dict[str, Any] | None:
    if live is None:
        return None
    since = live.updated_at
    return {
        **live.price.to_fields(),
        "source": live.source,
        "updated_at": None if since is None else _rfc3339(since),
        "age_s": None if since is None else round(max(0.0, time.time() - since), 3),
    }


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
