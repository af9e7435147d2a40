from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from proxy.upstream.response_memory import HeldMemory

PIECE = 256 * 2**10
"""Written at once: what a client does not read waits here, and not in its connection, which counts nothing."""


class WholeAnswer(Response):
    """One that is held until it was sent."""

    media_type = "application/json"

    def __init__(self, content: bytes, held: HeldMemory, headers: Mapping[str, str]) -> None:
        super().__init__(content, headers=headers)
        self._held = held

    async def __call__(self, _: Scope, __: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for start in range(0, len(self.body), PIECE):
                piece, more = self.body[start : start + PIECE], start + PIECE < len(self.body)
                await send({"type": "http.response.body", "body": piece, "more_body": more})
        finally:
            self._held.release()
