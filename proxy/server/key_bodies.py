from __future__ import annotations

from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, ClassVar, TypeVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SkipValidation,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from starlette.datastructures import Headers, MutableHeaders

from proxy.errors import BadRequest
from proxy.routing.chat_request import parse_object
from proxy.server.dependencies import app_state_of
from proxy.server.openapi import MODEL_NAME_SCHEMA, UNSET, null_or
from proxy.server.requests import read_body
from proxy.server.responses import error_response
from proxy.settings.model_config import check_model_name
from proxy.storage.client_keys import LIMITS, MAX_LAMBDA, MAX_PER_MINUTE, MAX_USD, KeyChange, Role
from proxy.storage.records import is_unix_time
from router_core.text import closest_name


class StrictJSONRoute(APIRoute):
    """Read a body within the limits of size and time, and parse it strictly, before FastAPI validates it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        required = self.body_field.field_info.is_required()

        async def handle_parsed(request: Request) -> Response:
            settings = (await app_state_of(request)).settings
            raw = await read_body(request, settings.max_body_bytes)
            document = parse_object(raw) if raw or required else {}
            return await handle(ParsedRequest(request, raw, document))

        return handle_parsed


class ParsedRequest(Request):
    """A request whose body has been read and parsed."""

    def __init__(self, request: Request, raw: bytes, document: dict[str, Any]) -> None:
        super().__init__(request.scope, request.receive)
        self._raw = raw
        self._document = document

    @property
    def headers(self) -> Headers:
        # FastAPI parses fewer content types than read_body accepts
        headers = MutableHeaders(raw=list(self.scope["headers"]))
        headers["content-type"] = "application/json"
        return headers

    async def body(self) -> bytes:
        return self._raw

    async def json(self) -> dict[str, Any]:
        return self._document


class StrictBody(BaseModel):
    """A body that is refused whole if a field of it is unknown or wrong.

    What has words of its own for a wrong value raises BadRequest, which passes through pydantic as it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    # What stands before a field's name in messages.
    prefix: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, document: Any) -> Any:
        if not isinstance(document, Mapping):
            return document
        reject_unknown_keys(document, cls.model_fields, cls.prefix)
        # a missing field is refused in the same words as null
        required = [name for name, field in cls.model_fields.items() if field.is_required()]
        return {**dict.fromkeys(required), **document}


def stated_fields(model: BaseModel) -> dict[str, Any]:
    """Return what `model` was made from, unchanged: those of its fields that were stated, then the others as sent."""
    known = {name: getattr(model, name) for name in type(model).model_fields if name in model.model_fields_set}
    return {**known, **(model.model_extra or {})}


B = TypeVar("B", bound=StrictBody)


def parse_body(kind: type[B], document: Mapping[str, Any]) -> B:
    """Raises BadRequest naming the field."""
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise bad_request(error.errors(include_url=False, include_input=False)) from None


async def handle_validation_error(_: Request, error: Exception) -> Response:
    """Answer FastAPI's RequestValidationError, whose places begin with `body`."""
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    return error_response(bad_request([{**problem, "loc": problem["loc"][1:]}]))


def bad_request(problems: Sequence[Any]) -> BadRequest:
    """Make the refusal of pydantic's first complaint."""
    path = ".".join(map(str, problems[0]["loc"]))
    message = problems[0]["msg"].removeprefix("Value error, ")
    return BadRequest(f"`{path}`: {message}" if path else message, param=path or None)


def reject_unknown_keys(document: Mapping[str, Any], known: Collection[str], prefix: str) -> None:
    for name in document:
        if name not in known:
            closest = closest_name(name, known)
            hint = f"did you mean `{prefix}{closest}`?" if closest else f"known are {', '.join(known)}"
            raise BadRequest(f"`{prefix}{name[:60]}` is not known here; {hint}", param=f"{prefix}{name[:60]}")


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
    """A model may be added after the key that allows it, but a name that no model can have is a mistake."""
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise BadRequest("`models` must be a list of model names with at least one, or null for all", param="models")
    try:
        return tuple(dict.fromkeys(map(check_model_name, value)))
    except ValueError as error:
        raise BadRequest(f"`models`: {error}"[:300], param="models") from None


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

# ClientKey checks these, in words of its own: a key must hold them whoever writes it.
Lambda = Annotated[Annotated[float, Field(ge=0, le=MAX_LAMBDA)] | None, SkipValidation]

PerMinute = Annotated[Annotated[int, Field(ge=1, le=MAX_PER_MINUTE)] | None, SkipValidation]

Usd = Annotated[Annotated[float, Field(ge=0, le=MAX_USD)] | None, SkipValidation]


class KeyPatch(StrictBody):
    """Fields that are stated replace those of the key, null removes them, and the others stay."""

    name: KeyName = UNSET
    models: ModelNames = None
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
        """`now`: Unix seconds. Raises BadRequest. What a ClientKey refuses is left to it."""
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


class Rotation(StrictBody):
    """How long the secret before goes on to open."""

    grace_s: Annotated[float, Field(ge=0, le=MAX_GRACE_S), BeforeValidator(_grace_s)] = 0
