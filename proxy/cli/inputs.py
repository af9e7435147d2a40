"""What several commands read and write: files, folders that can be made, an embedder. Parses nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from proxy.cli.console import BadArgument, CommandError, note

if TYPE_CHECKING:
    from router_core.types import Embedder


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
