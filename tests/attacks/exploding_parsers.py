"""Run every parser of what callers, upstreams and administrators write over every shape.
`test_linear_time` runs this in a child process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from proxy.errors import APIError, UpstreamError
from proxy.routing.chat_request import parse_chat
from proxy.routing.fingerprints import looks_random
from proxy.routing.requirements import requirements_of, routing_text
from proxy.server.admin_responses import redact_params
from proxy.server.auth import check_host, credentials_from
from proxy.server.requests import RequestHeaders, request_ids_from
from proxy.server.responses import render_error
from proxy.settings.litellm_params import is_model_info_of_litellm, reject_control_fields
from proxy.settings.schema import Settings
from proxy.storage.audit_log import action_of
from proxy.upstream.circuit_breaker import parse_retry_after
from proxy.upstream.errors import error_from_response
from proxy.upstream.payload import replace_model
from proxy.upstream.sse import encode_json
from router_core.documents import nearest_hint
from router_core.fitting import cluster_names
from router_core.text import truncate_middle
from tests.support.linear_time import read_all


class _Headers:
    """Return the same value for every header."""

    def __init__(self, value: str) -> None:
        self._value = value

    def getlist(self, key: str, /) -> list[str]:
        return [self._value]


def _with_ids(value: str) -> RequestHeaders:
    raw = value.encode("utf-8", "replace")
    return RequestHeaders([(name, raw) for name in (b"x-request-id", b"traceparent", b"x-uniroute-hops")])


def _allowing_refusals(read: Callable[[str], object]) -> Callable[[str], object]:
    """Accept a rendered refusal as an answer too."""

    def reading(text: str) -> object:
        try:
            return read(text)
        except (APIError, UnicodeError) as refusal:
            return str(refusal)

    return reading


def _chat(body: dict[str, Any]) -> object:
    return parse_chat(json.dumps({"model": "auto", "messages": [], **body}).encode(), [])


def _renamed(text: str) -> object:
    text = text.encode("utf-8", "replace").decode()  # half characters are refused when the body is parsed
    body = {"tools": [{"model": text}, {text: "model"}], "model": text}
    return replace_model(json.dumps(body).encode(), body, "other")


def _upstream_error(text: str) -> object:
    body = encode_json({"error": {"message": text, "code": text, "type": text}})
    described = [
        render_error(error_from_response(400, each, {"retry-after": text[:9]}, "m"))
        for each in (body, text.encode("utf-8", "replace"))
    ]
    return [encode_json(rendered) for _, rendered, _ in described]


def readers() -> dict[str, Callable[[str], object]]:
    found: dict[str, Callable[[str], object]] = {
        "text of a message": lambda text: _chat({"messages": [{"role": "user", "content": text}]}),
        "raw body": lambda text: parse_chat(text.encode("utf-8", "replace"), []),
        "field of a body": lambda text: _chat({text: 1}),
        "option": lambda text: _chat({"uniroute": {text: 1, "lambda": text, "session_id": text}}),
        "amounts": lambda text: _chat({"uniroute": {"lambda": text}, "provider": {"max_price": {"prompt": text}}}),
        "control field": lambda text: reject_control_fields({text * 50: 1}),
        "field within": lambda text: reject_control_fields({"metadata": {text: 1}, "extra_body": {text: 1}}),
        "routing text": lambda text: truncate_middle(routing_text([{"role": "user", "content": [{"text": text}]}])),
        "needs": lambda text: requirements_of({"messages": [{"role": text, "content": text}], "tools": [{text: text}]}),
        "call id": looks_random,
        "headers": lambda text: (request_ids_from(_with_ids(text)), credentials_from(_Headers(f"Bearer {text}"))),
        "host": lambda text: check_host(_Headers(text), Settings()),
        "retry-after": lambda text: parse_retry_after({"retry-after": text, "retry-after-ms": text}, 0.0),
        "error of an upstream": _upstream_error,
        "error in other words": lambda text: render_error(UpstreamError("m", status=500, body={"detail": text})),
        "model member": _renamed,
        "admin path": lambda text: action_of("PATCH", f"/admin/models/{text}"),
        "parameters of a model": lambda text: redact_params({text: text, "extra_headers": {text: text}}),
        "model_info": is_model_info_of_litellm,
        "names of clusters": lambda text: cluster_names([text, "other words"], np.array([0, 1]), 2),
        "misspelt name": lambda text: nearest_hint(text, ["answer", "answers", "pattern"]),
    }  # fmt: skip
    return {name: _allowing_refusals(read) for name, read in found.items()}


if __name__ == "__main__":
    read_all(readers(), sys.argv[1])
