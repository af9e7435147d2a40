from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, ClassVar, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    SkipValidation,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema

from proxy.errors import BadRequest
from proxy.routing.chat_request import amount
from proxy.server.openapi import MODEL_NAME_SCHEMA, UNSET, null_or
from proxy.server.strict_bodies import StrictBody, bad_request, reject_unknown_keys, stated_fields
from proxy.settings.litellm_params import ParamError, is_model_info_of_litellm, is_provider_param
from proxy.settings.model_config import (
    ModelConfig,
    ModelInfo,
    ModelName,
    NonNegativeFloat,
    SettingsError,
    StrictInt,
    check_model_name,
    resolve_secret,
)
from proxy.settings.outbound import OutboundError, ssl_context, trust_of
from proxy.settings.redaction import FoundSecret, find_secrets, is_reference
from proxy.settings.schema import PRESET_PREFIX, ProfileSettings, Settings
from proxy.storage.client_keys import (
    LIMITS,
    MAX_LAMBDA,
    MAX_PER_MINUTE,
    MAX_TAG_CHARS,
    MAX_TAGS,
    MAX_USD,
    TAG_RULE,
    KeyChange,
    Role,
)
from proxy.storage.records import ModelRecord, is_unix_time
from proxy.upstream.key_scope import ADDRESSES, check_secrets_stay
from router_core.clustering import ClusterMap
from router_core.profiles import Profile
from router_core.types import MAX_PRICE, PRICE_FIELDS, Price, price_field


def _object(value: Any, param: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise BadRequest(f"`{param}` must be an object", param=param)
    return value


def _checked_object(value: Any, info: ValidationInfo) -> Mapping[str, Any]:
    return _object(value, str(info.field_name))


def _switch(value: Any, info: ValidationInfo) -> bool:
    if not isinstance(value, bool):
        message = f"`{info.field_name}` must be true or false; got {value!r}"[:200]
        raise BadRequest(message, param=str(info.field_name))
    return value


class _JSONSchemaBounds:
    """Write bounds as JSON schema does: behind a validator of ours, pydantic leaves them as `ge`, `gt` and `le`.

    Every number that this stands at is 0 or more.
    """

    names: ClassVar = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum"}

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core_schema)
        self._rewrite(handler.resolve_ref_schema(schema))
        return schema

    def _rewrite(self, schema: dict[str, Any]) -> None:
        for name in self.names.keys() & schema.keys():
            schema[self.names[name]] = schema.pop(name)
        if schema.get("type") == "number" and "exclusiveMinimum" not in schema:
            schema.setdefault("minimum", 0)
        for below in (*schema.get("properties", {}).values(), *schema.get("anyOf", ())):
            self._rewrite(below)


class ProfileRequest(StrictBody):
    """Measure the model on so many prompts for so much money; what is left out is as in the settings."""

    prefix: ClassVar[str] = "profile."

    # bounds as in ProfileSettings
    prompts: Annotated[StrictInt, Field(ge=1, le=1000), _JSONSchemaBounds()] = UNSET
    max_usd: Annotated[NonNegativeFloat, _JSONSchemaBounds()] = UNSET

    def with_defaults(self, settings: Settings) -> ProfileSettings:
        return settings.profile.model_copy(update=stated_fields(self))


Share = Annotated[float, Field(ge=0, le=1)]


class ProfileDocument(BaseModel):
    """A profile that was measured already: `map`, `errors` and `labels` suffice."""

    # router_core checks it, in words of its own, so nothing is validated here
    model_config = ConfigDict(frozen=True, extra="allow", json_schema_extra={"required": ["map", "errors", "labels"]})

    map: Annotated[str, Field(min_length=1), SkipValidation] = UNSET
    errors: Annotated[list[Share], Field(min_length=1), SkipValidation] = UNSET
    labels: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1), SkipValidation] = UNSET
    mean_error: Annotated[Share, SkipValidation] = UNSET
    mean_output_tokens: Annotated[float | None, SkipValidation] = None
    mean_seconds: Annotated[float | None, SkipValidation] = None
    measured_at: Annotated[str | None, SkipValidation] = None

    def to_profile(self, cluster_map: ClusterMap) -> Profile:
        """Check the profile. Raises InvalidProfile, or BadRequest if it was measured on another map."""
        profile = Profile.from_json(stated_fields(self))
        if profile.map_id != cluster_map.id:
            raise BadRequest(
                f"the profile was measured on map {profile.map_id}, this server uses {cluster_map.id}", param="profile"
            )
        if profile.labels.size != cluster_map.size:
            raise BadRequest(
                f"the profile has {profile.labels.size} clusters, the map {cluster_map.size}", param="profile"
            )
        return profile


def _request_or_document(value: Any) -> ProfileRequest | ProfileDocument:
    document = _object(value, "profile")
    kind = ProfileDocument if {"errors", "error_sums"} & document.keys() else ProfileRequest
    return kind.model_validate(document)


ProfileBody = Annotated[ProfileRequest | ProfileDocument, BeforeValidator(_request_or_document)]


class Reprofile(StrictBody):
    """How to measure a model again, or its profile: bare, or as the member `profile` of an object."""

    profile: ProfileBody

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, document: Any) -> Any:
        return {"profile": document.get("profile", document)}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler.resolve_ref_schema(handler(core_schema))
        bare: dict[str, Any] = schema["properties"]["profile"]
        return {"anyOf": bare["anyOf"], "description": schema["description"]}


TIER_PATTERN = f"^({'|'.join(PRICE_FIELDS)})_above_[0-9]{{1,9}}k?_tokens$"

TOKEN_COST_SCHEMA = {"type": "number", "minimum": 0, "maximum": MAX_PRICE}

UsdPerToken = Annotated[float, WithJsonSchema(TOKEN_COST_SCHEMA), SkipValidation]

OptionalUsdPerToken = Annotated[float | None, WithJsonSchema(null_or(TOKEN_COST_SCHEMA)), SkipValidation]


_PARAMS_SCHEMA = {
    "type": "object",
    "properties": {"model": {"type": "string", "minLength": 1}},
    "required": ["model"],
    "description": "LiteLLM's: model, api_base, api_key as os.environ/NAME_API_KEY, and fixed parameters.",
}


class _InfoSchema(_JSONSchemaBounds):
    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = super().__get_pydantic_json_schema__(core_schema, handler)
        info = handler.resolve_ref_schema(schema)
        info.pop("additionalProperties", None)
        info["patternProperties"] = {TIER_PATTERN: null_or(TOKEN_COST_SCHEMA)}
        info["description"] = "What is known of a model. Fields that are not listed must be LiteLLM's."
        return schema


class _OrNull:
    """Say that null is taken too, as if the field were left out."""

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return null_or(handler(core_schema))


class NewModel(StrictBody, ModelConfig):
    model_name: Annotated[ModelName, WithJsonSchema(MODEL_NAME_SCHEMA)]
    litellm_params: Annotated[dict[str, Any], WithJsonSchema(_PARAMS_SCHEMA)]
    model_info: Annotated[ModelInfo, _InfoSchema(), _OrNull()] = ModelInfo()
    profile: Annotated[ProfileBody, _OrNull()] = ProfileRequest()

    @field_validator("model_info", mode="before")
    @classmethod
    def _without_litellms_own(cls, info: Any) -> dict[str, Any]:
        return _without_litellms_own(info)

    def to_record(self, settings: Settings, environ: Mapping[str, str], now: float) -> ModelRecord:
        """Return the record of the new model. `now`: Unix seconds. Raises BadRequest."""
        if self.model_name.removeprefix(PRESET_PREFIX) in settings.presets:
            raise BadRequest(f"{self.model_name!r} is the name of a preset: it asks for routing", param="model_name")
        if self.model_name in settings.route_names:
            raise BadRequest(f"{self.model_name!r} is one of route_names: it asks for routing", param="model_name")
        _check_params(self, settings, environ)
        return ModelRecord.of_entry(self, "admin", now)


class ModelPatch(StrictBody):
    """Fields that are stated replace those of the model, null removes them, and the others stay."""

    litellm_params: Annotated[dict[str, Any] | None, BeforeValidator(_checked_object)] = None
    model_info: Annotated[dict[str, Any] | None, BeforeValidator(_checked_object)] = None
    paused: Annotated[bool, BeforeValidator(_switch), Field(description="Stated alone.")] = UNSET

    @model_validator(mode="after")
    def _pause_alone(self) -> Self:
        if "paused" in self.model_fields_set and len(self.model_fields_set) > 1:
            raise BadRequest("`paused` is stated alone: change the other fields by another request", param="paused")
        return self

    def apply_to(self, record: ModelRecord, settings: Settings, environ: Mapping[str, str]) -> ModelRecord:
        """Return the record of the changed model. Raises BadRequest."""
        stated = self.litellm_params or {}
        info = _merged(record.info.model_dump(exclude_defaults=True), self.model_info or {})
        document = {
            "model_name": record.name,
            "litellm_params": _merged(record.litellm_params, stated),
            "model_info": _without_litellms_own(info),
        }
        try:
            model = ModelConfig.model_validate(document)
        except ValidationError as error:
            raise bad_request(error.errors(include_url=False, include_input=False)) from None
        _check_params(model, settings, environ)
        changed = ModelRecord.of_entry(model, record.source, record.created_at)
        check_secrets_stay(record, changed, stated)
        return changed


def _without_litellms_own(info: Any) -> dict[str, Any]:
    return {name: value for name, value in _object(info, "model_info").items() if not is_model_info_of_litellm(name)}


def _merged(before: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**before, **stated}.items() if value is not None}


# Parameters that hold prose, in which nothing looks like a secret.
_PROSE = ("model", "system")


def _check_params(model: ModelConfig, settings: Settings, environ: Mapping[str, str]) -> None:
    params = model.litellm_params
    try:
        model.check_effects()
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
            for found in find_secrets(name, value):
                raise _literal_secret(name, found)


def _check_references(param: str, value: Any, settings: Settings, environ: Mapping[str, str]) -> None:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_references(f"{param}.{name}", inner, settings, environ)
    elif is_reference(value):
        try:
            resolve_secret(value, environ, settings.allowed_env)
        except SettingsError as error:
            raise BadRequest(f"`{param}`: {error}", param=param) from None


def _literal_secret(name: str, found: FoundSecret) -> BadRequest:
    """Refuse what would be stored in Redis and its backups, and shown to everyone who may read models."""
    param = f"litellm_params.{found.path}"
    if is_provider_param(name) and name not in ADDRESSES:
        fix = f"`{param}` must name a variable of the server's environment, as os.environ/NAME_API_KEY"
    else:
        fix = f"`{param}` looks like a secret: state it in `extra_headers`, as os.environ/NAME_API_KEY"
    return BadRequest(f"{fix}; a literal key would be stored", param=param)


def _check_address(name: str, address: Any) -> None:
    if address is None or is_reference(address):
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


class PriceBody(StrictBody):
    """A whole price. Names of tiers, as input_cost_per_token_above_200k_tokens, may be added to each."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "additionalProperties": False,
            "patternProperties": {TIER_PATTERN: null_or(TOKEN_COST_SCHEMA)},
        },
    )

    input_cost_per_token: UsdPerToken
    output_cost_per_token: UsdPerToken
    cache_read_input_token_cost: OptionalUsdPerToken = None
    cache_creation_input_token_cost: OptionalUsdPerToken = None
    cache_creation_input_token_cost_above_1hr: OptionalUsdPerToken = None
    input_cost_per_audio_token: OptionalUsdPerToken = None
    cache_read_input_audio_token_cost: OptionalUsdPerToken = None
    input_cost_per_image_token: OptionalUsdPerToken = None
    output_cost_per_reasoning_token: OptionalUsdPerToken = None
    output_cost_per_audio_token: OptionalUsdPerToken = None
    output_cost_per_image_token: OptionalUsdPerToken = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, document: Any) -> Any:
        unknown = [name for name in document if price_field(name) is None]
        reject_unknown_keys(dict.fromkeys(unknown), PRICE_FIELDS, "")
        for name, value in document.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise BadRequest(f"`{name}` must be a number of USD per token; got {value!r}"[:200], param=name)
        for name in PRICE_FIELDS[:2]:
            if document.get(name) is None:
                raise BadRequest(f"`{name}` is missing: a price replaces the whole price before it", param=name)
        return document

    def to_price(self) -> Price:
        """Check the price. Raises InvalidPrice naming the field, or BadRequest."""
        stated = {name: value for name, value in stated_fields(self).items() if value is not None}
        try:
            return Price.from_fields({name: float(value) for name, value in stated.items()})
        except OverflowError:
            raise BadRequest("a price must be a finite number of USD per token") from None


_EXPIRY = ("expires_at", "expires_in_s")

MAX_EXPIRY_S = 100 * 365 * 86_400

MAX_GRACE_S = 30 * 86_400

_MAX_NAME_CHARS = 200


def _key_name(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > _MAX_NAME_CHARS or not value.isprintable():
        raise BadRequest(
            f"`name` must say whose key it is, in 1 to {_MAX_NAME_CHARS} printable characters", param="name"
        )
    return value


def _key_models(value: Any) -> tuple[str, ...] | None:
    """Check names of models. One may be added after the key, but a name that no model can have is a mistake."""
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise BadRequest("`models` must be a list of model names with at least one, or null for all", param="models")
    try:
        return tuple(dict.fromkeys(map(check_model_name, value)))
    except ValueError as error:
        raise BadRequest(f"`models`: {error}"[:300], param="models") from None


def _key_tags(value: Any) -> tuple[str, ...]:
    """Return the tags, each once; a ClientKey checks them."""
    if not isinstance(value, list | None) or not all(isinstance(tag, str) for tag in value or ()):
        raise BadRequest(f"`tags` must be a list of {TAG_RULE}, or null for none", param="tags")
    return tuple(dict.fromkeys(value or ()))


def _unix_time(value: Any) -> float | None:
    if value is None:
        return None
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


def _seconds_to_expiry(value: Any) -> float | None:
    return None if value is None else _seconds(value, "expires_in_s", MAX_EXPIRY_S)


def _grace_s(value: Any) -> float:
    return _seconds(value, "grace_s", MAX_GRACE_S)


def _seconds(value: Any, name: str, maximum: int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= maximum:
        raise BadRequest(f"`{name}` must be seconds from 0 to {maximum}; got {value!r}"[:200], param=name)
    return float(value)


KeyName = Annotated[str, Field(min_length=1, max_length=_MAX_NAME_CHARS), BeforeValidator(_key_name)]

ModelNames = Annotated[
    Annotated[tuple[Annotated[str, WithJsonSchema(MODEL_NAME_SCHEMA)], ...], Field(min_length=1)] | None,
    BeforeValidator(_key_models),
]

Tags = Annotated[
    Annotated[tuple[Annotated[str, Field(min_length=1, max_length=MAX_TAG_CHARS)], ...], Field(max_length=MAX_TAGS)]
    | None,
    BeforeValidator(_key_tags),
]

# ClientKey checks these, in words of its own: a key must hold them whoever writes it.
Lambda = Annotated[Annotated[float, Field(ge=0, le=MAX_LAMBDA)] | None, SkipValidation]

PerMinute = Annotated[Annotated[int, Field(ge=1, le=MAX_PER_MINUTE)] | None, SkipValidation]

Usd = Annotated[Annotated[float, Field(ge=0, le=MAX_USD)] | None, SkipValidation]


class KeyPatch(StrictBody):
    """Fields that are stated replace those of the key, null removes them, and the others stay."""

    name: KeyName = UNSET
    models: ModelNames = None
    tags: Tags = None
    role: Annotated[Role | None, SkipValidation] = None
    expires_at: Annotated[
        float | None,
        BeforeValidator(_unix_time),
        WithJsonSchema(null_or({"type": "string", "format": "date-time"})),
    ] = None
    expires_in_s: Annotated[
        Annotated[float, Field(ge=0, le=MAX_EXPIRY_S)] | None, BeforeValidator(_seconds_to_expiry)
    ] = None
    lambda_default: Lambda = None
    lambda_min: Lambda = None
    lambda_max: Lambda = None
    requests_per_minute: PerMinute = None
    tokens_per_minute: PerMinute = None
    usd_per_day: Usd = None
    usd_per_month: Usd = None

    def to_change(self, now: float) -> KeyChange:
        """Return what changes of the key. Raises BadRequest; what a ClientKey refuses is left to it.

        Args:
            now: Unix seconds.
        """
        stated = stated_fields(self)
        limits = {name: stated.pop(name) for name in LIMITS if name in stated}
        if stated.get("role", "") is None:
            stated["role"] = "client"
        if any(name in stated for name in _EXPIRY):
            at, in_s = (stated.pop(name, None) for name in _EXPIRY)
            if at is not None and in_s is not None:
                raise BadRequest("state `expires_at` or `expires_in_s`, not both", param="expires_at")
            stated["expires_at"] = at if in_s is None else now + in_s
        return KeyChange(stated, limits)


class NewKey(KeyPatch):
    name: KeyName

    def to_change(self, now: float) -> KeyChange:
        change = super().to_change(now)
        expires_at = change.fields.get("expires_at")
        if expires_at is not None and expires_at <= now:
            given = "expires_at" if self.expires_in_s is None else "expires_in_s"
            raise BadRequest(f"`{given}` is in the past: the key would open nothing", param=given)
        return change


def _lambda(value: Any) -> float:
    if value is None:
        raise BadRequest("`lambda` is missing; DELETE goes back to the configuration's", param="lambda")
    return amount(value, "lambda")


class RunTimeSettings(StrictBody):
    """All settings that hold in place of the configuration's from now on."""

    lambda_: Annotated[float, Field(alias="lambda", ge=0, le=MAX_LAMBDA), BeforeValidator(_lambda), _JSONSchemaBounds()]


class Rotation(StrictBody):
    """How long the secret before goes on to open."""

    grace_s: Annotated[float, Field(ge=0, le=MAX_GRACE_S), BeforeValidator(_grace_s)] = 0
