"""Serve FastAPI over litellm's SDK alone: any gateway on it pays this. Arguments: the upstream's URL, its port."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse


def app(upstream_url: str) -> FastAPI:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm

    floor = FastAPI()

    @floor.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> Response:
        body = await request.json()
        body["model"] = f"openai/{body['model']}"
        answer: Any = await litellm.acompletion(
            **body,
            api_base=upstream_url,
            api_key="-",
            max_retries=0,
            _skip_mcp_handler=True,  # it would import `mcp` where there are tools
        )
        if not body.get("stream"):
            return Response(answer.model_dump_json(), media_type="application/json")

        async def events() -> AsyncIterator[str]:
            async for chunk in answer:
                yield f"data: {chunk.model_dump_json()}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return floor


if __name__ == "__main__":
    uvicorn.run(app(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="error", access_log=False)
