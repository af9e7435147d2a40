"""Bodies of admin calls, checked whole before anything is written. No Redis, no HTTP."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from proxy.errors import BadRequest
from proxy.outbound import OutboundError, ssl_context, trust_of
from proxy.safety.redaction import Literal, is_reference, literals, shown
from proxy.settings.litellm_names import is_model_info_of_litellm
from proxy.settings.models import ModelEntry, ParamError, SettingsError, resolve_secret
from proxy.settings.schema import ProfileSettings, Settings
from proxy.storage.models import ModelRecord
from proxy.upstream.litellm.params import is_provider_param
from proxy.upstream.origins import ADDRESSES, check_secrets_stay
from router_core.clustering import ClusterMap
from router_core.profiles import Profile
from router_core.types import PRICE_FIELDS, Price, price_field

_PROSE = ("model", "system")
_ADD = ("model_name", "litellm_params", "model_info", "profile")
_PATCH = ("litellm_params", "model_info")


@dataclass(frozen=True)
class Asking:
    """Measure by asking the model so many prompts for so much money."""

    prompts: int
    max_usd: float


@dataclass(frozen=True)
class Addition:
    record: ModelRecord
    profile: Asking | Profile


def read_addition(
    body: Mapping[str, Any], settings: Settings, environ: Mapping[str, str], cluster_map: ClusterMap, now: float
) -> Addition:
    """Raises BadRequest, or InvalidProfile, naming the field."""
    known_only(body, _ADD, "")
    name = body.get("model_name")
    if name in settings.route_names:
        raise BadRequest(f"{name!r} is one of route_names: it asks for routing", param="model_name")
    entry = _entry(name, body.get("litellm_params"), body.get("model_info"))
    _check_params(entry, settings, environ)
    profile = read_profile(body.get("profile"), settings, cluster_map)
    return Addition(ModelRecord.of_entry(entry, "admin", now), profile)


def read_patch(
    body: Mapping[str, Any], record: ModelRecord, settings: Settings, environ: Mapping[str, str]
) -> ModelRecord:
    """Stated fields replace, null removes; what is not stated stays. Raises BadRequest."""
    known_only(body, _PATCH, "")
    stated = _object(body.get("litellm_params"), "litellm_params")
    params = _merged(record.litellm_params, stated)
    info = _merged(record.info.model_dump(exclude_defaults=True), _object(body.get("model_info"), "model_info"))
    entry = _entry(record.name, params, info)
    _check_params(entry, settings, environ)
    changed = ModelRecord.of_entry(entry, record.source, record.created_at)
    check_secrets_stay(record, changed, stated)
    return changed


def read_profile(stated: Any, settings: Settings, cluster_map: ClusterMap) -> Asking | Profile:
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
    known_only(document, ("prompts", "max_usd"), "profile.")
    defaults = settings.profile
    try:
        asked = ProfileSettings(
            prompts=document.get("prompts", defaults.prompts), max_usd=document.get("max_usd", defaults.max_usd)
        )
    except ValidationError as error:
        raise _invalid(error, "profile.") from None
    return Asking(asked.prompts, asked.max_usd)


def read_price(body: Mapping[str, Any]) -> Price:
    """The whole price. Raises BadRequest, or InvalidPrice, naming the field."""
    known_only({name: None for name in body if price_field(name) is None}, PRICE_FIELDS, "")
    stated = {name: value for name, value in body.items() if value is not None}
    for name, value in stated.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BadRequest(f"`{name}` must be a number of USD per token; got {value!r}"[:200], param=name)
    for name in PRICE_FIELDS[:2]:
        if name not in stated:
            raise BadRequest(f"`{name}` is missing: a price replaces the whole price before it", param=name)
    try:
        return Price.of({name: float(value) for name, value in stated.items()})
    except OverflowError:
        raise BadRequest("a price must be a finite number of USD per token") from None


def shown_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """litellm_params without secrets: references to the environment are shown, literal keys and headers are not."""
    return {name: shown(name, value) for name, value in params.items()}


def _entry(name: Any, params: Any, info: Any) -> ModelEntry:
    stated = {key: value for key, value in _object(info, "model_info").items() if not is_model_info_of_litellm(key)}
    document = {"model_name": name, "litellm_params": params, "model_info": stated}
    try:
        return ModelEntry.model_validate(document)
    except ValidationError as error:
        raise _invalid(error, "") from None


def _check_params(entry: ModelEntry, settings: Settings, environ: Mapping[str, str]) -> None:
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
            for literal in literals(name, value):
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


def _stored(name: str, literal: Literal) -> BadRequest:
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


def known_only(body: Mapping[str, Any], known: Collection[str], prefix: str) -> None:
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
