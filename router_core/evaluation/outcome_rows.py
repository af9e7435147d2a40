"""An outcomes file line by line, each checked on its own. What the lines make together is outcomes.py."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from router_core.documents import MAX_LINE_BYTES, parse_json
from router_core.errors import InvalidOutcomes
from router_core.validation.fields import shown

MOST = 1e9
"""Tokens or seconds of one answer: what is beyond is a mistake."""
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class OutcomeRow:
    """What the models made of one prompt. A model that is absent was not asked, or that figure was not measured."""

    prompt: str
    source: str
    """"" where it is not stated."""
    scores: Mapping[str, float]
    """In [0, 1]; one model or more."""
    output_tokens: Mapping[str, float]
    seconds: Mapping[str, float]


def read_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """("FILE, line N", JSON object) pairs, one line in memory at a time; gzip is known by its first bytes.

    Raises:
        InvalidOutcomes: at the first line that is no JSON object, or where the file cannot be read further.
    """
    try:
        with path.open("rb") as raw, _unzipped(raw) as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_BYTES + 1), b""), 1):
                content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if content.strip():
                    where = f"{path}, line {number}"
                    yield where, json_object(_text(content, where), where)
    except (EOFError, zlib.error):
        raise InvalidOutcomes(f"{path}: the gzip file is cut off or damaged; copy it again") from None
    except OSError as error:
        raise InvalidOutcomes(f"{path}: cannot be read ({error.strerror or error})") from None


def _unzipped(raw: BufferedReader) -> BufferedReader | gzip.GzipFile:
    return gzip.open(raw) if raw.peek(len(_GZIP)).startswith(_GZIP) else raw


def _text(line: bytes, where: str) -> str:
    if len(line) > MAX_LINE_BYTES:
        raise InvalidOutcomes(f"{where}: is longer than {MAX_LINE_BYTES:,} bytes; write one JSON object a line")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise InvalidOutcomes(f"{where}: is not UTF-8 text at byte {error.start + 1}; save the file as UTF-8") from None


def json_object(text: str, where: str) -> dict[str, Any]:
    """Raises InvalidOutcomes where `text` is anything else, or states a name twice."""
    try:
        value = parse_json(text, _without_repeats)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise InvalidOutcomes(f"{where}: is not JSON ({error.msg} at {line}column {error.colno})") from None
    except ValueError as error:
        raise InvalidOutcomes(f"{where}: is not usable JSON ({error})") from None
    if not isinstance(value, dict):
        raise InvalidOutcomes(f"{where}: must be a JSON object; got {shown(value)}")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice[:100]!r} is stated twice: keep one")
    return found


def parse_row(where: str, row: Mapping[str, Any]) -> OutcomeRow:
    """Raises InvalidOutcomes that begins with `where` and says the value and the fix. Other fields are passed over."""
    prompt, source = row.get("prompt"), row.get("source")
    if not isinstance(prompt, str) or not prompt.strip():
        raise InvalidOutcomes(f'{where}: needs "prompt", a text that is not empty; got {_got(row, "prompt")}')
    if not isinstance(source, str | None):
        raise InvalidOutcomes(f'{where}: "source" must be a text; got {shown(source)}')
    if not isinstance(row.get("scores"), Mapping) or not row["scores"]:
        raise InvalidOutcomes(f'{where}: needs "scores", such as {{"model-a": 1.0}}; got {_got(row, "scores")}')
    return OutcomeRow(
        prompt=prompt,
        source=source or "",
        scores=_numbers(where, row, "scores", 1.0, "scale it, or leave out who was not asked"),
        output_tokens=_numbers(where, row, "output_tokens", MOST, "leave out what was not measured"),
        seconds=_numbers(where, row, "seconds", MOST, "leave out what was not measured"),
    )


def _is_text(name: str) -> bool:
    """JSON can state a lone surrogate, and no file can take one."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _got(row: Mapping[str, Any], field: str) -> str:
    return shown(row[field]) if field in row else "none"


def _numbers(where: str, row: Mapping[str, Any], field: str, most: float, fix: str) -> Mapping[str, float]:
    values = row.get(field)
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise InvalidOutcomes(f'{where}: "{field}" must be an object, a number for each model; got {shown(values)}')
    for model, value in values.items():
        if not _is_text(model):
            raise InvalidOutcomes(f"{where}: {field} names {shown(model)}, a lone surrogate; write the name as UTF-8")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            raise InvalidOutcomes(
                f"{where}: {field}[{shown(model)}] must be a number from 0 to {most:g}; got {shown(value)}; {fix}"
            )
    return {model: float(value) for model, value in values.items()}
