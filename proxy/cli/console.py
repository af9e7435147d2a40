"""Output of commands: results on stdout, progress and messages on stderr.

Names, reasons and errors come from a store or a server, so control characters are removed from all that is written.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol
from unicodedata import east_asian_width

import typer

from router_core.text import plain

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


class Progress(Protocol):
    def update(self, label: str, done: int, total: int, remark: str = "") -> None:
        """Show how far `label` is. `total` is 0 while it is unknown."""


@contextmanager
def progress() -> Iterator[Progress]:
    """Show a bar for each label on a terminal; elsewhere a line at its start, every few seconds, and at its end."""
    if not sys.stderr.isatty():
        yield _Lines()
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
    def __init__(self) -> None:
        self._last: dict[str, tuple[float, tuple[int, int]]] = {}

    def update(self, label: str, done: int, total: int, remark: str = "") -> None:
        then, before = self._last.get(label, (0.0, (-1, -1)))
        complete = 0 < total <= done
        if (done, total) == before or (not complete and time.monotonic() - then < LINE_INTERVAL_S):
            return
        self._last[label] = (time.monotonic(), (done, total))
        echo_err(plain(f"{label}: {done}{f'/{total}' if total else ''} {remark}".rstrip(), lines=False))


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

    return load_settings(config, os.environ, overrides)


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
