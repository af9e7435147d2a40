"""What reads the words of callers, upstreams and administrators, with every shape: run in a child process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from proxy.errors import ProxyError, UpstreamFailure
from proxy.routing.chat_request import parse_chat
from proxy.routing.control_fields import refuse_control_fields
from proxy.routing.fingerprints import is_random
from proxy.routing.requirements import needs_of, routing_text
from proxy.server.admin_schemas import shown_params
from proxy.server.auth import check_host, presented
from proxy.server.requests import trace_of
from proxy.server.responses import describe
from proxy.settings.litellm_names import is_model_info_of_litellm
from proxy.settings.schema import Settings
from proxy.storage.audit_log import act_of
from proxy.upstream.circuit_breaker import stated_wait_s
from proxy.upstream.errors import refused
from proxy.upstream.payload import with_model
from proxy.upstream.sse import dump
from router_core.embedding import excerpt
from router_core.fitting import cluster_names
from router_core.validation.fields import nearest_hint
from tests.support.exploding import read_all


class _Headers:
    """Every header has this value."""

    def __init__(self, value: str) -> None:
        self._value = value

    def getlist(self, key: str, /) -> list[str]:
        return [self._value]


def _told(read: Callable[[str], object]) -> Callable[[str], object]:
    """A refusal in our own words is an answer too."""

    def reading(text: str) -> object:
        try:
            return read(text)
        except (ProxyError, UnicodeError) as refusal:
            return str(refusal)

    return reading


def _chat(body: dict[str, Any]) -> object:
    return parse_chat(json.dumps({"model": "auto", "messages": [], **body}).encode(), [])


def _renamed(text: str) -> object:
    text = text.encode("utf-8", "replace").decode()  # half characters are refused when the body is parsed
    body = {"tools": [{"model": text}, {text: "model"}], "model": text}
    return with_model(json.dumps(body).encode(), body, "other")


def _upstream_error(text: str) -> object:
    body = dump({"error": {"message": text, "code": text, "type": text}})
    described = [
        describe(refused(400, each, {"retry-after": text[:9]}, "m")) for each in (body, text.encode("utf-8", "replace"))
    ]
    return [dump(said) for _, said, _ in described]


def readers() -> dict[str, Callable[[str], object]]:
    found: dict[str, Callable[[str], object]] = {
        "text of a message": lambda text: _chat({"messages": [{"role": "user", "content": text}]}),
        "raw body": lambda text: parse_chat(text.encode("utf-8", "replace"), []),
        "field of a body": lambda text: _chat({text: 1}),
        "option": lambda text: _chat({"uniroute": {text: 1, "lambda": text, "session_id": text}}),
        "amounts": lambda text: _chat({"uniroute": {"lambda": text}, "provider": {"max_price": {"prompt": text}}}),
        "control field": lambda text: refuse_control_fields({text * 50: 1}),
        "field within": lambda text: refuse_control_fields({"metadata": {text: 1}, "extra_body": {text: 1}}),
        "routing text": lambda text: excerpt(routing_text([{"role": "user", "content": [{"text": text}]}])),
        "needs": lambda text: needs_of({"messages": [{"role": text, "content": text}], "tools": [{text: text}]}),
        "call id": is_random,
        "headers": lambda text: (trace_of(_Headers(text)), presented(_Headers(f"Bearer {text}"))),
        "host": lambda text: check_host(_Headers(text), Settings()),
        "retry-after": lambda text: stated_wait_s({"retry-after": text, "retry-after-ms": text}, 0.0),
        "error of an upstream": _upstream_error,
        "error in other words": lambda text: describe(UpstreamFailure("m", status=500, body={"detail": text})),
        "model member": _renamed,
        "admin path": lambda text: act_of("PATCH", f"/admin/models/{text}"),
        "parameters of a model": lambda text: shown_params({text: text, "extra_headers": {text: text}}),
        "model_info": is_model_info_of_litellm,
        "names of clusters": lambda text: cluster_names([text, "other words"], np.array([0, 1]), 2),
        "misspelt name": lambda text: nearest_hint(text, ["answer", "answers", "pattern"]),
    }  # fmt: skip
    return {name: _told(read) for name, read in found.items()}


if __name__ == "__main__":
    read_all(readers(), sys.argv[1])
