"""GET /admin/audit: who changed what, newest first, as the store keeps it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from proxy.errors import BadRequest
from proxy.routes.context import Audit

audit_router = APIRouter(prefix="/admin/audit")

_SHOWN = 100
_MOST_SHOWN = 1000


@audit_router.get("", response_model=None)
async def get_audit(request: Request, audit: Audit) -> dict[str, Any]:
    return {"entries": await audit.latest(_limit(request.query_params.getlist("limit")))}


def _limit(stated: list[str]) -> int:
    text = stated[0] if len(stated) == 1 else "" if stated else str(_SHOWN)
    if text.isascii() and text.isdigit() and len(text) < 6 and 1 <= int(text) <= _MOST_SHOWN:
        return int(text)
    raise BadRequest(f"`limit` must be a whole number from 1 to {_MOST_SHOWN}, stated once", param="limit")
