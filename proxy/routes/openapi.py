"""GET /openapi.json: the interface described, behind the same door as the interface."""

from __future__ import annotations

from fastapi import APIRouter, Response

from proxy.openapi.document import document
from proxy.upstream.sse import dump

router = APIRouter()


@router.get("/openapi.json", response_model=None)
async def openapi() -> Response:
    return Response(dump(document()), media_type="application/json")
