"""Write requests of the kinds that gateways see, no two alike, so that no cache helps anybody.

One word in twenty is `PLACEHOLDER`, which the load generator replaces by eight letters that it uses once: no
text is sent twice, and neither are all its words.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any, Literal

from tests.bench.prompts import generated_prompts
from tests.support.client_apis import PATHS, APIName

Body = dict[str, Any]
LoadAPI = APIName | Literal["embeddings"]
PLACEHOLDER = "@" * 8
# Replaced in a header by the number of the request in its file.
NUMBER = "#"
WORDS_PER_PLACEHOLDER = 20
# Tokens that each request asks for.
LIMIT = 64


def short(words: Iterator[str], _: Random) -> Body:
    """Write 200 characters."""
    return _user_body(words, 200)


def medium(words: Iterator[str], _: Random) -> Body:
    """Write 2 KB of the newest turn."""
    return _user_body(words, 2_000)


def mixed(words: Iterator[str], rng: Random) -> Body:
    """Write up to 2 KB, as chats are."""
    return _user_body(words, rng.choice((60, 200, 500, 1_000, 2_000)))


def tools(words: Iterator[str], rng: Random) -> Body:
    """Write a mixed request with eight tools."""
    return {**mixed(words, rng), "tools": _tools(words, 8)}


def large(words: Iterator[str], _: Random) -> Body:
    """Write 100 KB in one turn."""
    return _user_body(words, 100_000)


def agent(words: Iterator[str], rng: Random) -> Body:
    """Write 60 turns with tool calls and results, and 40 tools."""
    described = _tools(words, 40)
    messages: list[Body] = [{"role": "system", "content": _text(words, 2_000)}]
    for turn in range(15):
        call = {"id": f"call_{rng.randrange(10**12)}", "type": "function"}
        called = {**call, "function": {"name": f"tool_{turn}", "arguments": json.dumps({"path": _text(words, 40)})}}
        messages += [
            {"role": "user", "content": _text(words, 150)},
            {"role": "assistant", "content": None, "tool_calls": [called]},
            {"role": "tool", "tool_call_id": call["id"], "content": _text(words, 600)},
            {"role": "assistant", "content": _text(words, 200)},
        ]
    messages.append({"role": "user", "content": _text(words, 150)})
    return {"messages": messages, "tools": described}


def _tools(words: Iterator[str], count: int) -> list[Body]:
    parameters = {"type": "object", "properties": {"path": {"type": "string"}, "limit": {"type": "integer"}}}
    described = [
        {"name": f"tool_{n}", "description": _text(words, 200), "parameters": parameters} for n in range(count)
    ]
    return [{"type": "function", "function": each} for each in described]


def sized(characters: int) -> Callable[[Iterator[str], Random], Body]:
    return lambda words, _: _user_body(words, characters)


Make = Callable[[Iterator[str], Random], Body]
# Kind → how one is made, and how many there are before marks alone tell them apart.
KINDS: Mapping[str, tuple[Make, int]] = {
    "short": (short, 1_000),
    "2 KB": (medium, 1_000),
    "mixed": (mixed, 1_000),
    "100 KB": (large, 60),
    "tools": (tools, 1_000),
    "agent": (agent, 60),
}
FEWEST, LARGEST_FILE = 2, 20_000_000


def kind_of(name: str) -> tuple[Make, int]:
    """Return one of `KINDS`, or one for as many characters as the name says."""
    if not name.isdecimal():
        return KINDS[name]
    size = int(name)
    return sized(size), max(FEWEST, min(1_000, LARGEST_FILE // size))


def write_requests(
    path: Path,
    kind: tuple[Make, int],
    model: str,
    *,
    stream: bool,
    pace_ms: int = 0,
    headers: Mapping[str, str] | None = None,
    api: LoadAPI = "chat",
) -> Path:
    """Write a file of records: a 32-bit length, then a whole request.

    Args:
        pace_ms: between the events of its stream.
        headers: of each; `NUMBER` in a value is the number of the request.
    """
    make, count = kind
    words, rng = _words(count), Random(count)
    more = {**({} if api == "embeddings" else {"stream": stream}), **({"user": f"pace-{pace_ms}"} if pace_ms else {})}
    all_headers = {"host": "127.0.0.1", "content-type": "application/json", **(headers or {})}
    lines = "".join(f"{name}: {value}\r\n" for name, value in all_headers.items())
    where = "/v1/embeddings" if api == "embeddings" else PATHS[api]
    with path.open("wb") as file:
        for number in range(count):
            content = {"model": model, **make(words, rng), "max_tokens": LIMIT, **more}
            body = json.dumps(_in_api(api, content), separators=(",", ":")).encode()
            own_lines = lines.replace(NUMBER, str(number))
            head = f"POST {where} HTTP/1.1\r\n{own_lines}content-length: {len(body)}\r\n\r\n"
            write_record(file, head.encode() + body)
    return path


def _in_api(api: LoadAPI, body: Body) -> Body:
    """Return a chat body of plain turns as the same request of another API. Messages has the same fields."""
    if api in ("chat", "messages"):
        return body
    if api in ("completions", "embeddings"):
        rest = {name: value for name, value in body.items() if name != "messages"}
        text = body["messages"][-1]["content"]
        return {**rest, "prompt": text} if api == "completions" else {"model": body["model"], "input": text}
    rest = {name: value for name, value in body.items() if name not in ("messages", "max_tokens")}
    return {**rest, "input": body["messages"], "max_output_tokens": body["max_tokens"], "store": False}


def write_record(file: Any, record: bytes) -> None:
    """Write a record in this machine's byte order, as the C programs read it."""
    file.write(len(record).to_bytes(4, sys.byteorder) + record)


def read_records(path: Path) -> list[bytes]:
    rest, records = path.read_bytes(), []
    while rest:
        end = 4 + int.from_bytes(rest[:4], sys.byteorder)
        records.append(rest[4:end])
        rest = rest[end:]
    return records


def _words(seed: int) -> Iterator[str]:
    rng = Random(seed)
    for prompt in generated_prompts(10**9, seed):
        for word in prompt.split():
            yield PLACEHOLDER if rng.randrange(WORDS_PER_PLACEHOLDER) == 0 else word


def _user_body(words: Iterator[str], characters: int) -> Body:
    return {"messages": [{"role": "user", "content": _text(words, characters)}]}


def _text(words: Iterator[str], characters: int) -> str:
    """Return a text that begins with a placeholder. One that is cut off at the end does not count."""
    found, length = [PLACEHOLDER], len(PLACEHOLDER)
    while length < characters:
        found.append(next(words))
        length += 1 + len(found[-1])
    return " ".join(found)[:characters].rstrip("@ ") if length > characters else " ".join(found)
