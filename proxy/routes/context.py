"""What every route reads of a request: the services, the caller, the ids. No behaviour."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request

from proxy.auth import KEY_IN_SCOPE
from proxy.body import read_body
from proxy.edge import ARRIVED, TRACE
from proxy.routing.request import parse_object
from proxy.services import Services
from proxy.state.records import ClientKey
from proxy.trace import Trace


async def services_of(request: Request) -> Services:
    services: Services = request.app.state.holder.services
    return services


async def key_of(request: Request) -> ClientKey | None:
    key: ClientKey | None = request.scope[KEY_IN_SCOPE]
    return key


OurServices = Annotated[Services, Depends(services_of)]
Caller = Annotated[ClientKey | None, Depends(key_of)]


def trace_of(request: Request) -> Trace:
    trace: Trace = request.scope[TRACE]
    return trace


def arrived_at(request: Request) -> float:
    return float(request.scope[ARRIVED])


def headers_of(request: Request) -> list[tuple[str, str]]:
    """Every header, repeated ones repeated."""
    return [(name.lower(), value) for name, value in request.headers.items()]


async def json_object(request: Request, services: Services) -> dict[str, Any]:
    """Raises BadRequest, NotJson, BodyTooLarge."""
    return parse_object(await read_body(request, services.settings.max_body_bytes))
