"""What several commands read and write: files, folders that can be made, an embedder. Parses nothing."""

from __future__ import annotations

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

    What is in the file stays until it is written; a new one is empty until then.
    """
    try:
        with path.open("ab"):
            return path
    except OSError as error:
        raise BadArgument(f"{where}: {path} cannot be written ({error.strerror})") from None


def empty_folder(path: Path, where: str) -> Path:
    """The path, made a folder if it is none: before the work, not after it. Raises BadArgument."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BadArgument(f"{where}: {path} exists and is not an empty folder; choose another")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadArgument(f"{where}: {path} cannot be made ({error.strerror})") from None
    return path


def opened_embedder(kind: str, data_dir: Path) -> Embedder:
    """With its model loaded. Raises CommandError when that cannot be had."""
    from router_core.embedding import open_embedder

    try:
        embedder = open_embedder(kind, data_dir, note)
        embedder.embed(["."])
    except OSError as error:
        reason = " ".join(str(error).split())
        raise CommandError(f"the embedder {kind!r} cannot be loaded: {reason}") from None
    return embedder
