from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from typing import Any

import httpx

from proxy.settings.outbound import http_client
from proxy.upstream.litellm_transport import HOOKS, CallTransport, client_over

_WARM_UP_RESPONSE = {
    "id": "warm-up",
    "object": "chat.completion",
    "created": 0,
    "model": "warm-up",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "-"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


def import_litellm() -> Any:
    """Import litellm and switch off what it does beside calling models.

    This takes seconds: call it in a thread. It raises whatever litellm raises, and may be called again then.
    """
    try:
        return _import_and_configure()
    except BaseException:
        # the next attempt would take what is left of a failed import for whole modules
        for name in [name for name in sys.modules if name.partition(".")[0] == "litellm"]:
            del sys.modules[name]
        raise


def _import_and_configure() -> Any:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # otherwise its import fetches a price map from the network
    import litellm

    litellm.telemetry = False
    litellm.suppress_debug_info = True
    litellm.turn_off_message_logging = True
    litellm.drop_params = False
    litellm.modify_params = False
    litellm.user_url_validation = True  # some formats carry media within: it fetches them, and must not from inside
    litellm.user_url_allowed_hosts = []
    for hooks in ("callbacks", "input_callback", "success_callback", "failure_callback", "service_callback"):
        setattr(litellm, hooks, [])
    warnings.filterwarnings("ignore", message="Item .* on TypedDict", category=UserWarning)  # of its own models
    warnings.filterwarnings("ignore", message="coroutine '.*acompletion' was never awaited", category=RuntimeWarning)
    for name in ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # its error lines carry prompts
    _replace_http_clients()
    return litellm


def _replace_http_clients() -> None:
    """Replace the HTTP clients that litellm makes by ours.

    Its own would follow a redirect, which takes the prompt, and in some formats the key, to wherever the upstream
    points. It would also read proxies and certificates itself.
    """
    from litellm.llms.custom_httpx.http_handler import AsyncHTTPHandler, HTTPHandler
    from litellm.llms.openai.common_utils import BaseOpenAILLM

    AsyncHTTPHandler.create_client = _async_client
    HTTPHandler.create_client = _client
    BaseOpenAILLM._get_async_http_client = staticmethod(_async_client)
    BaseOpenAILLM._get_sync_http_client = staticmethod(_client)


def _async_client(*_: Any, timeout: float | httpx.Timeout | None = None, **__: Any) -> httpx.AsyncClient:
    return client_over(CallTransport(), timeout)


def _client(*_: Any, timeout: float | httpx.Timeout | None = None, **__: Any) -> httpx.Client:
    return http_client(timeout=timeout)


def disable_request_logging() -> None:
    """Keep litellm from making log entries of what this task calls from now on.

    Without callbacks nobody reads them, and they are made on the event loop: a third of the cost of a call, and a
    search through the whole text of a long error.
    """
    from litellm._internal_context import is_internal_call

    is_internal_call.set(True)


async def warm_up(litellm: Any) -> None:
    """Call a mock of each kind: litellm imports half of itself on the first call, and more on the first failure."""
    import openai

    nowhere = httpx.MockTransport(_nowhere)
    async with httpx.AsyncClient(transport=nowhere, trust_env=False) as pool:
        client = openai.AsyncOpenAI(api_key="-", base_url="http://nowhere.invalid/v1", http_client=pool, max_retries=0)
        for stream in (False, True):
            await litellm.acompletion(
                model="openai/warm-up", messages=[{"role": "user", "content": "-"}], client=client, stream=stream
            )
        with contextlib.suppress(openai.OpenAIError):
            await litellm.acompletion(
                model="openai/unreachable", messages=[{"role": "user", "content": "-"}], client=client, max_retries=0
            )


def _nowhere(request: httpx.Request) -> httpx.Response:
    if b"unreachable" in request.content:
        raise httpx.ConnectError("nowhere")
    return httpx.Response(200, json=_WARM_UP_RESPONSE)


def http_handler(pool: httpx.AsyncClient) -> Any:
    """Make litellm's own client class over our pool, for the providers that do not use OpenAI's SDK."""
    from litellm.llms.custom_httpx.http_handler import AsyncHTTPHandler

    class OnceHandler(AsyncHTTPHandler):  # type: ignore[misc]  # a base that mypy does not follow
        """A handler that sends a request once.

        After a broken connection litellm's sends it again through a client of its own: billed twice, recorded once.
        """

        async def single_connection_post_request(self, *_: Any, **__: Any) -> Any:
            raise  # the exception that is being handled by the caller

    handler = OnceHandler(event_hooks=HOOKS, follow_redirects=False)
    handler.client = pool
    return handler
