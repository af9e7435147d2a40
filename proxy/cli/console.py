"""What a person sees and a script reads: progress, tables, JSON. Progress goes to stderr, results to stdout.

Names, reasons and errors come from a store or a server: nothing in them is left for a terminal to obey.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from unicodedata import east_asian_width

from router_core.text import plain

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from router_core.types import Embedder


_LINE_EVERY_S = 5.0


class CommandError(Exception):
    """The work failed; the message says why in one line."""

    exit_code = 1


class BadArgument(CommandError):
    """What was asked for makes no sense; the message says what would."""

    exit_code = 2


def say(text: str = "") -> None:
    write(text + "\n")


def write(text: str) -> None:
    """Without a line end: tokens as they come. Raises CommandError where nobody can take them."""
    if sys.stdout is None:
        raise CommandError("the output cannot be written: standard output is closed")
    print(plain(text), end="", flush=True)  # noqa: T201


def note(text: str) -> None:
    """On stderr; where that cannot be written nobody is told, and the work goes on."""
    with suppress(OSError):
        print(plain(text), file=sys.stderr, flush=True)  # noqa: T201


def emit_json(value: object) -> None:
    """In JSON nothing is left out: what a terminal would obey is written as \\uXXXX."""
    text = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False)
    say("".join(letter if letter.isprintable() or letter == "\n" else _escaped(letter) for letter in text))


def _escaped(letter: str) -> str:
    return json.dumps(letter)[1:-1]


class Progress(Protocol):
    def update(self, label: str, done: int, total: int, remark: str = "") -> None:
        """`total` is 0 while nobody knows it."""


@contextmanager
def progress() -> Iterator[Progress]:
    """A bar per label on a terminal; elsewhere a line when it starts, every few seconds, and when it is complete."""
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
        if (done, total) == before or (not complete and time.monotonic() - then < _LINE_EVERY_S):
            return
        self._last[label] = (time.monotonic(), (done, total))
        note(plain(f"{label}: {done}{f'/{total}' if total else ''} {remark}".rstrip(), lines=False))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "") -> None:
    """Plain aligned columns, the first to the left, the others to the right; the same on a terminal and in a file."""
    cells = [[plain(str(cell), lines=False) for cell in row] for row in rows]
    widths = [max(map(_width, column)) for column in zip(columns, *cells, strict=True)]
    if title:
        say(title)
    for first, *rest in [list(columns), *cells]:
        aligned = [" " * (width - _width(cell)) + cell for cell, width in zip(rest, widths[1:], strict=True)]
        say("  " + "  ".join([first + " " * (widths[0] - _width(first)), *aligned]).rstrip())


def _width(text: str) -> int:
    """Columns on a terminal: a Chinese character takes two."""
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def readable(path: Path, where: str) -> Path:
    """The path, once its file has been opened. Raises BadArgument."""
    try:
        with path.open("rb"):
            return path
    except OSError as error:
        raise BadArgument(f"{where}: {path} cannot be read ({error.strerror})") from None


def writable(path: Path, where: str) -> Path:
    """The path, once its file has been opened for writing: before the work, not after it. Raises BadArgument.

    Nothing is changed: what is in the file stays, and one that is not there is not there afterwards.
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


def utf8_name(path: Path, where: str) -> Path:
    """The path, if what is written may tell the file's name. Raises BadArgument: a name can be any bytes."""
    try:
        path.name.encode()
    except UnicodeEncodeError:
        raise BadArgument(f"{where}: the name of {path} is not UTF-8 text; rename the file") from None
    return path


def all_apart(files: Mapping[str, Path | None]) -> None:
    """By option. Raises BadArgument where two are one file: what is written would replace what was read."""
    found: dict[Path, str] = {}
    for where, path in files.items():
        if path and found.setdefault(path.resolve(), where) != where:
            raise BadArgument(f"{where}: {path} is the file of {found[path.resolve()]} too; give another")


def empty_folder(path: Path, where: str) -> Path:
    """The path, made a folder if it is none: before the work, not after it. Raises BadArgument."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BadArgument(f"{where}: {path} exists and is not an empty folder; choose another")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadArgument(f"{where}: {path} cannot be made ({error.strerror})") from None
    return path


def known_embedder(kind: str, where: str) -> str:
    """The name, if there is such an embedder on this machine: before the work, not after it. Raises BadArgument."""
    from router_core.embedding import check_embedder
    from router_core.errors import InvalidArtifact

    try:
        check_embedder(kind)
    except InvalidArtifact as error:
        raise BadArgument(f"{where}: {error}") from None
    return kind


def opened_embedder(kind: str, data_dir: Path) -> Embedder:
    """With its model loaded. Raises CommandError when that cannot be had."""
    from router_core.embedding import open_embedder

    try:
        embedder = open_embedder(kind, data_dir, note)
        embedder.embed(["."])
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CommandError(f"the embedder {kind!r} cannot be loaded: {reason}") from None
    return embedder
