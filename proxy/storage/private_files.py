from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

log = logging.getLogger("uniroute")

# Permissions of group and others.
OTHERS = 0o077


class NotPrivate(Exception):
    """A folder cannot be kept from other users. The message says what to do."""


def private_folder(folder: Path) -> None:
    """Make `folder` for this user alone, or close one of this user's to others.

    Raises:
        NotPrivate: it cannot be used, or belongs to another user and is open to others.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = stat.S_IMODE(folder.stat().st_mode)
        if mode & OTHERS:
            close_to_others(folder)
            log.info("%s was open to other users (mode %o) and is closed to them", folder, mode)
    except PermissionError as error:
        raise NotPrivate(
            f"{folder} belongs to another user and is open to others, or closed to this one;"
            f" set UNIROUTE_DATA_DIR to a folder of this user's own, such as {folder / 'uniroute'}"
        ) from error
    except OSError as error:
        raise NotPrivate(f"cannot use {folder}: {error.strerror}; set UNIROUTE_DATA_DIR elsewhere") from error


def close_to_others(path: Path) -> None:
    """Take all permissions from group and others. Raises OSError."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & OTHERS:
        path.chmod(mode & ~OTHERS)


def private_opener(path: str, flags: int) -> int:
    """Open a file for `open(opener=…)`; a new one is for this user alone."""
    return os.open(path, flags, 0o600)
