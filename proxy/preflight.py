"""Files that settings name, read before any process serves: a mistake is one line at the start, not a traceback."""

from __future__ import annotations

from pathlib import Path

from proxy.settings import Settings, SettingsError
from router_core.artifact import builtin_map, load_map
from router_core.clustering import ClusterMap
from router_core.errors import InvalidInput
from router_core.validation.builtin import builtin_validation_set
from router_core.validation.loading import load_validation_set
from router_core.validation.prompts import ValidationSet

BUILTIN = "builtin"


def check_files(settings: Settings) -> None:
    """Raises SettingsError naming the setting: its file is missing or broken."""
    map_of(settings)
    if settings.validation_set != BUILTIN:
        validation_set_of(settings)


def map_of(settings: Settings) -> ClusterMap:
    """The cluster map that the settings ask for. Raises SettingsError."""
    try:
        return builtin_map() if settings.map == BUILTIN else load_map(Path(settings.map))
    except InvalidInput as error:
        raise SettingsError(f"map: {error}") from error


def validation_set_of(settings: Settings) -> ValidationSet:
    """The validation set that the settings ask for. Raises SettingsError, with the line of a broken file."""
    if settings.validation_set == BUILTIN:
        return builtin_validation_set()
    try:
        return load_validation_set(Path(settings.validation_set))
    except InvalidInput as error:
        raise SettingsError(f"validation_set: {error}") from error
    except OSError as error:
        raise SettingsError(f"validation_set: {settings.validation_set}: {error.strerror}") from error
