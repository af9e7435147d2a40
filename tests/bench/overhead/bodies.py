"""Requests of the kinds that gateways see, all different, so that no cache flatters anybody."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from tests.bench.prompts import generated_prompts

Body = dict[str, Any]
LIMIT = 64


def short(prompts: Iterator[str], _: Random) -> Body:
    """About 200 characters."""
    return {"messages": [{"role": "user", "content": next(prompts)[:200]}]}


def medium(prompts: Iterator[str], _: Random) -> Body:
    """2 KB of the newest turn."""
    return {"messages": [{"role": "user", "content": _text(prompts, 2_000)}]}


def mixed(prompts: Iterator[str], rng: Random) -> Body:
    """Up to 2 KB, as chats are."""
    return {"messages": [{"role": "user", "content": _text(prompts, rng.choice((60, 200, 500, 1_000, 2_000)))}]}


def large(prompts: Iterator[str], _: Random) -> Body:
    """100 KB in one turn."""
    return {"messages": [{"role": "user", "content": _text(prompts, 100_000)}]}


def agent(prompts: Iterator[str], rng: Random) -> Body:
    """60 turns with tool calls and results, and 40 tools."""
    parameters = {"type": "object", "properties": {"path": {"type": "string"}, "limit": {"type": "integer"}}}
    tools = [
        {
            "type": "function",
            "function": {"name": f"tool_{n}", "description": _text(prompts, 200), "parameters": parameters},
        }
        for n in range(40)
    ]
    messages: list[Body] = [{"role": "system", "content": _text(prompts, 2_000)}]
    for turn in range(15):
        call = {"id": f"call_{rng.randrange(10**12)}", "type": "function"}
        called = {**call, "function": {"name": f"tool_{turn}", "arguments": json.dumps({"path": _text(prompts, 40)})}}
        messages += [
            {"role": "user", "content": _text(prompts, 150)},
            {"role": "assistant", "content": None, "tool_calls": [called]},
            {"role": "tool", "tool_call_id": call["id"], "content": _text(prompts, 600)},
            {"role": "assistant", "content": _text(prompts, 200)},
        ]
    messages.append({"role": "user", "content": _text(prompts, 150)})
    return {"messages": messages, "tools": tools}


KINDS: Mapping[str, tuple[Callable[[Iterator[str], Random], Body], int]] = {
    "short": (short, 2_000),
    "2 KB": (medium, 1_000),
    "mixed": (mixed, 2_000),
    "100 KB": (large, 60),
    "agent": (agent, 60),
}
"""Kind → how one is made, and how many different ones there are."""


def write_bodies(path: Path, kind: str, model: str, *, stream: bool) -> Path:
    make, count = KINDS[kind]
    prompts, rng = generated_prompts(10**9, seed=len(kind)), Random(count)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            body = {"model": model, **make(prompts, rng), "max_tokens": LIMIT, "stream": stream}
            file.write(json.dumps(body, separators=(",", ":")) + "\n")
    return path


def _text(prompts: Iterator[str], characters: int) -> str:
    return " ".join(islice(prompts, 1 + characters // 40))[:characters]
