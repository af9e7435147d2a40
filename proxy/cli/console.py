"""Output of commands: results on stdout, progress and messages on stderr.

Names, reasons and errors come from a store or a server, so control characters are removed from all that is written.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import sys
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol
from unicodedata import east_asian_width

import typer

from router_core.documents import MAX_LINE_BYTES, DocumentTooLarge, parse_json
from router_core.text import plain, truncate_middle

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from proxy.settings.schema import Settings
    from proxy.storage.registry import Registry
    from router_core.types import Embedder
    from router_core.validation.validation_set import ValidationSet


LINE_INTERVAL_S = 5.0


class CommandError(Exception):
    """The work failed. The message says why, in one line."""

    exit_code = 1


class BadArgument(CommandError):
    """An argument is wrong. The message says what would be right."""

    exit_code = 2


def echo(text: str = "", end: str = "\n") -> None:
    """Write to stdout. Raises CommandError if that is closed."""
    if sys.stdout is None:
        raise CommandError("the output cannot be written: standard output is closed")
    print(plain(text), end=end, flush=True)  # noqa: T201


def echo_err(text: str) -> None:
    """Write to stderr. If that fails the work goes on."""
    with suppress(OSError):
        print(plain(text), file=sys.stderr, flush=True)  # noqa: T201


def emit_json(value: object) -> None:
    """Write JSON in which unprintable characters are \\uXXXX: none is left out, and a terminal obeys none."""
    text = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False)
    echo("".join(letter if letter.isprintable() or letter == "\n" else _escaped(letter) for letter in text))


def _escaped(letter: str) -> str:
    return json.dumps(letter)[1:-1]


# Writes one line for the user.
Say = Callable[[str], None]


class Progress(Protocol):
    def update(self, label: str, done: int, total: int, remark: str = "") -> None:
        """Show how far `label` is. `total` is 0 while it is unknown."""


@contextmanager
def progress(say: Say = echo_err) -> Iterator[Progress]:
    """Show a bar for each label on a terminal; elsewhere a line at its start, every few seconds, and at its end.

    Args:
        say: writes the lines. Any other than `echo_err` writes lines on a terminal too.
    """
    if say is not echo_err or not sys.stderr.isatty():
        yield _Lines(say)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description:<14}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[remark]}", markup=False),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bars:
        yield _Bars(bars)


class _Bars:
    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def update(self, label: str, done: int, total: int, remark: str = "") -> None:
        label, remark = plain(label, lines=False), plain(remark, lines=False)
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, remark=remark)
        self._bars.update(self._tasks[label], completed=done, total=total or None, remark=remark)


class _Lines:
    def __init__(self, say: Say) -> None:
        self._say = say
        self._last: dict[str, tuple[float, tuple[int, int]]] = {}

    def update(self, label: str, done: int, total: int, remark: str = "") -> None:
        then, before = self._last.get(label, (0.0, (-1, -1)))
        complete = 0 < total <= done
        if (done, total) == before or (not complete and time.monotonic() - then < LINE_INTERVAL_S):
            return
        self._last[label] = (time.monotonic(), (done, total))
        self._say(plain(f"{label}: {done}{f'/{total}' if total else ''} {remark}".rstrip(), lines=False))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "") -> None:
    """Write aligned columns: the first to the left, the others to the right."""
    cells = [[plain(str(cell), lines=False) for cell in row] for row in rows]
    widths = [max(map(_width, column)) for column in zip(columns, *cells, strict=True)]
    if title:
        echo(title)
    for first, *rest in [list(columns), *cells]:
        aligned = [" " * (width - _width(cell)) + cell for cell, width in zip(rest, widths[1:], strict=True)]
        echo("  " + "  ".join([first + " " * (widths[0] - _width(first)), *aligned]).rstrip())


def _width(text: str) -> int:
    """Return the columns that the text takes on a terminal: two for a Chinese character."""
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def require_readable(path: Path, where: str) -> Path:
    """Return the path if its file can be read. Raises BadArgument."""
    try:
        with path.open("rb"):
            return path
    except OSError as error:
        raise BadArgument(f"{where}: {path} cannot be read ({error.strerror})") from None


def require_writable(path: Path, where: str) -> Path:
    """Return the path if its file can be written, and change nothing: to be known before the work, not after it.

    Raises:
        BadArgument: it cannot be written.
    """
    new = not path.exists()
    try:
        with path.open("ab"):
            pass
        if new:
            path.unlink()
    except OSError as error:
        raise BadArgument(f"{where}: {path} cannot be written ({error.strerror})") from None
    return path


def require_utf8_name(path: Path, where: str) -> Path:
    """Return the path if its name is UTF-8, so that it can be printed. Raises BadArgument."""
    try:
        path.name.encode()
    except UnicodeEncodeError:
        raise BadArgument(f"{where}: the name of {path} is not UTF-8 text; rename the file") from None
    return path


def require_distinct(files: Mapping[str, Path | None]) -> None:
    """Check that no two options name the same file: output would replace input. Raises BadArgument."""
    found: dict[Path, str] = {}
    for where, path in files.items():
        if path and found.setdefault(path.resolve(), where) != where:
            raise BadArgument(f"{where}: {path} is the file of {found[path.resolve()]} too; give another")


def require_empty_folder(path: Path, where: str) -> Path:
    """Return the path, created if need be, if it is an empty folder. Raises BadArgument."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BadArgument(f"{where}: {path} exists and is not an empty folder; choose another")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadArgument(f"{where}: {path} cannot be made ({error.strerror})") from None
    return path


def require_embedder(kind: str, where: str) -> str:
    """Return the name if this machine has that embedder. Raises BadArgument."""
    from router_core.embedding import check_embedder
    from router_core.errors import InvalidArtifact

    try:
        check_embedder(kind)
    except InvalidArtifact as error:
        raise BadArgument(f"{where}: {error}") from None
    return kind


def load_embedder(kind: str, data_dir: Path) -> Embedder:
    """Open the embedder and load its model. Raises CommandError where that fails."""
    from router_core.embedding import open_embedder

    try:
        embedder = open_embedder(kind, data_dir, echo_err)
        embedder.embed(["."])
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CommandError(f"the embedder {kind!r} cannot be loaded: {reason}") from None
    return embedder


def finite(value: float | None) -> float | None:
    """Reject `inf` and `nan` as the value of an option: they parse as numbers, and no JSON can carry them."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"must be a finite number; got {value}")
    return value


ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="UNIROUTE_CONFIG", help="Configuration file (LiteLLM's YAML shape)."),
]

DataDirOption = Annotated[
    Path | None, typer.Option("--data-dir", help="Folder of the embedded store and of the caches.")
]

UrlOption = Annotated[
    str | None,
    typer.Option("--url", envvar="UNIROUTE_URL", help="A running server; by default http://127.0.0.1:$UNIROUTE_PORT."),
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else on stdout.")]


def read_settings(config: Path | None, **overrides: object) -> Settings:
    """Read the settings from the options, the environment and the configuration file, in this order of precedence."""
    from proxy.settings.schema import load_settings

    settings = load_settings(config, os.environ, overrides)
    if not settings.compiled:
        from router_core import kernels

        kernels.use(kernels.NUMPY)
    return settings


def read_validation_set(source: str) -> ValidationSet:
    """Read the `builtin` validation set, or a JSONL file.

    Raises:
        BadArgument: the file cannot be read.
        InvalidValidationSet: naming the broken line.
    """
    from router_core.validation.families.registry import builtin_validation_set
    from router_core.validation.loading import load_validation_set

    if source == "builtin":
        return builtin_validation_set()
    return load_validation_set(require_readable(Path(source), "FILE"))


@asynccontextmanager
async def open_registry(settings: Settings) -> AsyncIterator[Registry]:
    """Open the store itself, for which no server needs to run; the embedded store of a running server is joined."""
    from proxy.storage.audit_log import CLI
    from proxy.storage.client_keys import AuthRequiredLatch
    from proxy.storage.redis import Store
    from proxy.storage.registry import Registry

    store = await Store.open(settings)
    try:
        configured = [entry.model_name for entry in settings.model_list]
        yield Registry(store, configured, AuthRequiredLatch(settings.data_dir), CLI)
    finally:
        await store.close()


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
