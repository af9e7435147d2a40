"""How bodies of the admin side are read: parsed strictly, and refused whole if a field is unknown or wrong."""

from __future__ import annotations

from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    model_validator,
)
from starlette.datastructures import Headers, MutableHeaders

from proxy.errors import BadRequest
from proxy.routing.chat_request import parse_object
from proxy.server.exchange import ASGIExchange, read_body
from proxy.server.requests import APP_STATE
from proxy.server.responses import error_response
from router_core.text import closest_name


class StrictJSONRoute(APIRoute):
    """Read a body within the limits of size and time, and parse it strictly, before FastAPI validates it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        required = self.body_field.field_info.is_required()

        async def handle_parsed(request: Request) -> Response:
            raw = await read_body(ASGIExchange.of(request), request.scope[APP_STATE].settings.max_body_bytes)
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
        fields = {field.alias or name: field for name, field in cls.model_fields.items()}
        reject_unknown_keys(document, fields, cls.prefix)
        # a missing field is refused in the same words as null
        required = [name for name, field in fields.items() if field.is_required()]
        return {**dict.fromkeys(required), **document}


def stated_fields(model: BaseModel) -> dict[str, Any]:
    """Return what `model` was made from, unchanged: those of its fields that were stated, then the others as sent."""
    known = {name: getattr(model, name) for name in type(model).model_fields if name in model.model_fields_set}
    return {**known, **(model.model_extra or {})}


B = TypeVar("B", bound=StrictBody)


def parse_body(kind: type[B], document: Mapping[str, Any]) -> B:
    """Validate a parsed body. Raises BadRequest naming the field."""
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
