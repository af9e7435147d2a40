"""Three prompts through the official OpenAI client, streamed to the terminal, each with the choice and why."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from proxy.cli.client import ServerClient
from proxy.cli.console import say, write
from proxy.cli.route import show_decision
from proxy.outbound import http_client

if TYPE_CHECKING:
    from openai import OpenAI

_MOST_TOKENS = 120


@dataclass(frozen=True)
class Question:
    text: str
    remark: str
    headers: Mapping[str, str] = field(default_factory=dict)


THREE = (
    Question("What is the capital of France?", "the default λ: the price counts a little"),
    Question("What is the capital of France?", "λ = 0: the best answer at any price", {"lambda": "0"}),
    Question("Write one sentence about the sea.", "λ = 2: the price counts a lot", {"lambda": "2"}),
)


def ask_three(url: str) -> None:
    from openai import OpenAI

    key = os.environ.get("UNIROUTE_API_KEY") or "not-needed-on-this-machine"
    http = http_client(timeout=600)
    with OpenAI(base_url=f"{url}/v1", api_key=key, http_client=http) as client, ServerClient(url, key) as dry:
        for number, question in enumerate(THREE, 1):
            say(f"\n── {number}. {question.text}   ({question.remark})")
            ask(client, question)
            show_decision(dry.call("POST", "/v1/route", _body(question)))


def ask(client: OpenAI, question: Question) -> None:
    """Tokens appear as they come; then the headers that say who was chosen."""
    create = client.chat.completions.with_raw_response.create
    reply = create(
        model="auto",
        messages=[{"role": "user", "content": question.text}],
        max_tokens=_MOST_TOKENS,
        stream=True,
        extra_headers=dict(question.headers),
    )
    write("   ")
    for chunk in reply.parse():
        if chunk.choices and (text := chunk.choices[0].delta.content):
            write(text.replace("\n", "\n   "))
    say()
    shown = ("x-uniroute-model", "x-uniroute-reason", "x-uniroute-overhead-ms")
    say("   " + "  ".join(f"{name}: {reply.headers.get(name)}" for name in shown))


def _body(question: Question) -> dict[str, Any]:
    """The same request for the dry run, which tells why."""
    body: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": question.text}]}
    body["max_tokens"] = _MOST_TOKENS
    if "lambda" in question.headers:
        body["uniroute"] = {"lambda": float(question.headers["lambda"])}
    return body
