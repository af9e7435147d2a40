"""Files that settings name, read before any process serves: a mistake is one line at the start, not a traceback."""

from __future__ import annotations

from pathlib import Path

from proxy.cluster_maps import open_map
from proxy.private import NotPrivate, private_folder
from proxy.settings import Settings, SettingsError
from router_core.errors import InvalidInput
from router_core.validation.loading import load_validation_set


def check_files(settings: Settings) -> None:
    """Raises SettingsError naming the setting whose file is missing or broken, with the line of a validation set."""
    check_data_dir(settings)
    try:
        open_map(settings)
    except (InvalidInput, OSError) as error:
        raise SettingsError(f"map: {error}") from error
    try:
        if settings.validation_set != "builtin":
            load_validation_set(Path(settings.validation_set))
    except (InvalidInput, OSError) as error:
        raise SettingsError(f"validation_set: {error}") from error


def check_data_dir(settings: Settings) -> None:
    """Close the data folder to other users. Raises SettingsError where that cannot be done."""
    try:
        private_folder(settings.data_dir)
    except NotPrivate as error:
        raise SettingsError(f"data_dir: {error}") from error
