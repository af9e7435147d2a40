"""Prompts for fitting a map, read one by one from text or JSONL files, gzipped or not. No fitting."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from proxy.cli.console import BadArgument


def read_prompts(paths: Iterable[Path]) -> Iterator[str]:
    """One text per line; in `*.jsonl` and `*.jsonl.gz` the object's "prompt", or the user turns of its "messages"."""
    for path in paths:
        read = _jsonl if path.name.removesuffix(".gz").endswith((".jsonl", ".ndjson")) else _text
        try:
            yield from read(path)
        except OSError as error:
            raise BadArgument(f"{path}: cannot be read ({error.strerror or error})") from None
        except UnicodeDecodeError:
            raise BadArgument(f"{path}: is not UTF-8 text") from None


def _lines(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        yield from lines


def _text(path: Path) -> Iterator[str]:
    return (line.strip() for line in _lines(path) if line.strip())


def _jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            text = _prompt_of(json.loads(line))
        except ValueError as error:
            raise BadArgument(f"{path}, line {number}: is not JSON ({error})") from None
        if text is None:
            raise BadArgument(f'{path}, line {number}: needs "prompt" (text) or "messages" (a list of chat messages)')
        yield text


def _prompt_of(row: Any) -> str | None:
    if not isinstance(row, dict):
        return None
    if isinstance(row.get("prompt"), str):
        return str(row["prompt"])
    messages = row.get("messages")
    if not isinstance(messages, list):
        return None
    users = [m["content"] for m in messages if isinstance(m, dict) and m.get("role") == "user"]
    return "\n".join(content for content in users if isinstance(content, str)) or None
