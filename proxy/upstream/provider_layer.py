"""litellm as a library: imported without its network calls, telemetry, logs and callbacks, and warm. No requests."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import httpx

from proxy.upstream.wire import HOOKS

_ANSWER = {
    "id": "warm-up",
    "object": "chat.completion",
    "created": 0,
    "model": "warm-up",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "-"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


def import_litellm() -> Any:
    """Takes seconds: call it in a thread."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # otherwise its import fetches a price map from the network
    import litellm

    litellm.telemetry = False
    litellm.suppress_debug_info = True
    litellm.turn_off_message_logging = True
    litellm.drop_params = False
    litellm.modify_params = False
    for hooks in ("callbacks", "input_callback", "success_callback", "failure_callback", "service_callback"):
        setattr(litellm, hooks, [])
    warnings.filterwarnings("ignore", message="Item .* on TypedDict", category=UserWarning)  # of its own models
    for name in ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # its error lines carry prompts
    return litellm


def keep_no_books() -> None:
    """For what this task calls from now on: litellm makes no log entry of it.

    Without callbacks nobody would read one, and it is made on the event loop: a third of what a call costs, and where
    a model fails with many words, a search through all of them.
    """
    from litellm._internal_context import is_internal_call

    is_internal_call.set(True)


async def warm_up(litellm: Any) -> None:
    """One call of each kind to nowhere: litellm imports half of itself on the first, which takes a second."""
    import openai

    nowhere = httpx.MockTransport(lambda _: httpx.Response(200, json=_ANSWER))
    async with httpx.AsyncClient(transport=nowhere) as pool:
        client = openai.AsyncOpenAI(api_key="-", base_url="http://nowhere.invalid/v1", http_client=pool, max_retries=0)
        for stream in (False, True):
            await litellm.acompletion(
                model="openai/warm-up", messages=[{"role": "user", "content": "-"}], client=client, stream=stream
            )


def handler_over(pool: httpx.AsyncClient) -> Any:
    """litellm's own client class over our pool, for the providers that do not go through OpenAI's SDK."""
    from litellm.llms.custom_httpx.http_handler import AsyncHTTPHandler

    handler = AsyncHTTPHandler(event_hooks=HOOKS, follow_redirects=False)
    handler.client = pool
    return handler
