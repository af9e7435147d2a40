"""What every route reads of a request: the services, the caller, the ids. No behaviour."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from fastapi import Depends, Request

from proxy.auth import KEY_IN_SCOPE, WHO_IN_SCOPE
from proxy.body import read_body
from proxy.edge import ARRIVED, TRACE
from proxy.routing.chat_request import parse_object
from proxy.services import Services
from proxy.storage.audit_log import AuditTrail, Author
from proxy.storage.client_keys import ClientKey
from proxy.trace import Trace


async def services_of(request: Request) -> Services:
    services: Services = request.app.state.holder.services
    return services


async def key_of(request: Request) -> ClientKey | None:
    key: ClientKey | None = request.scope[KEY_IN_SCOPE]
    return key


OurServices = Annotated[Services, Depends(services_of)]
Caller = Annotated[ClientKey | None, Depends(key_of)]


async def author_of(request: Request) -> Author:
    return Author(request.scope[WHO_IN_SCOPE], trace_of(request).request_id)


Writing = Annotated[Author, Depends(author_of)]


async def admin_services_of(services: OurServices, author: Writing) -> Services:
    """Whatever is written to this registry has an audit line."""
    return replace(services, registry=services.registry.by(author))


async def audit_of(services: OurServices, author: Writing) -> AuditTrail:
    return AuditTrail(services.store, author)


AdminServices = Annotated[Services, Depends(admin_services_of)]
Audit = Annotated[AuditTrail, Depends(audit_of)]


def trace_of(request: Request) -> Trace:
    trace: Trace = request.scope[TRACE]
    return trace


def arrived_at(request: Request) -> float:
    return float(request.scope[ARRIVED])


async def json_object(request: Request, services: Services) -> dict[str, Any]:
    """Raises BadRequest, NotJson, BodyTooLarge."""
    return parse_object(await read_body(request, services.settings.max_body_bytes))


async def json_object_or_nothing(request: Request, services: Services) -> dict[str, Any]:
    """No body at all is an empty object."""
    raw = await read_body(request, services.settings.max_body_bytes)
    return parse_object(raw) if raw else {}
