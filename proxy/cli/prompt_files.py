from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from proxy.cli.console import BadArgument, require_readable
from router_core.documents import MAX_LINE_BYTES, DocumentTooLarge, parse_json
from router_core.text import truncate_middle

_PARQUET_ROWS = 1024

_PARQUET_BUFFER = 1 << 20

_FIELDS = ("prompt", "messages")

_NEEDS = 'needs "prompt" (text) or "messages" (a list of chat messages)'


def check_prompt_files(paths: Iterable[Path]) -> None:
    """Check that all of them can be read, before any is. Raises BadArgument."""
    for path in paths:
        require_readable(path, "PROMPTS")
        if _reader(path) is _parquet and find_spec("pyarrow") is None:
            raise BadArgument(f"{path}: reading Parquet needs pyarrow; pip install 'uniroute[parquet]'")


def read_prompts(paths: Iterable[Path]) -> Iterator[str]:
    """Yield one text a line of a text file, and of JSONL and Parquet the "prompt" or the user turns of the "messages".

    A text that is too long to be routed by the whole of it is cut as routing cuts it.
    """
    for path in paths:
        try:
            yield from map(truncate_middle, _reader(path)(path))
        except OSError as error:
            raise BadArgument(f"{path}: cannot be read ({error.strerror or error})") from None
        except (EOFError, zlib.error):
            raise BadArgument(f"{path}: its compressed data is broken or cut off; make the file again") from None
        except UnicodeDecodeError:
            raise BadArgument(f"{path}: is not UTF-8 text") from None


def _reader(path: Path) -> Callable[[Path], Iterator[str]]:
    if path.suffix == ".parquet":
        return _parquet
    return _jsonl if path.name.removesuffix(".gz").endswith((".jsonl", ".ndjson")) else _text


def _lines(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_BYTES), ""), 1):
            if len(line) == MAX_LINE_BYTES:
                raise BadArgument(f"{path}, line {number}: is longer than {MAX_LINE_BYTES:,} characters")
            yield line


def _text(path: Path) -> Iterator[str]:
    return (line.strip() for line in _lines(path) if line.strip())


def _jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            text = _prompt_of(parse_json(line))
        except DocumentTooLarge as error:
            raise BadArgument(f"{path}, line {number}: {error}") from None
        except ValueError as error:
            raise BadArgument(f"{path}, line {number}: is not JSON ({error})") from None
        if text is None:
            raise BadArgument(f"{path}, line {number}: {_NEEDS}")
        yield text


def _parquet(path: Path) -> Iterator[str]:
    for number, row in enumerate(_parquet_rows(path), 1):
        text = _prompt_of(row)
        if text is None:
            raise BadArgument(f"{path}, row {number}: {_NEEDS}")
        yield text


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows with the columns that are needed, holding one buffer of each in memory."""
    from pyarrow.lib import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path, buffer_size=_PARQUET_BUFFER, pre_buffer=False) as file:
            columns = [name for name in _FIELDS if name in file.schema_arrow.names]
            if not columns:
                found = ", ".join(file.schema_arrow.names) or "none"
                raise BadArgument(f"{path}: {_NEEDS} as a column; it has {found}")
            for batch in file.iter_batches(_PARQUET_ROWS, columns=columns, use_threads=False):
                yield from batch.to_pylist()
    except ArrowException as error:
        raise BadArgument(f"{path}: is not a Parquet file that can be read ({error})") from None


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
