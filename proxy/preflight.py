"""Files that settings name, read before any process serves: a mistake is one line at the start, not a traceback."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path

from proxy.cluster_maps import open_map
from proxy.outbound import OutboundError, ssl_context, trust_of
from proxy.safety.private_files import NotPrivate, private_folder
from proxy.safety.redaction import is_reference
from proxy.settings.models import SettingsError
from proxy.settings.schema import Settings
from router_core.embedding import check_embedder
from router_core.errors import InvalidInput
from router_core.validation.loading import load_validation_set

settings_log = logging.getLogger("uniroute.settings")


def check_files(settings: Settings) -> None:
    """Raises SettingsError naming the setting whose file is missing or broken, with the line of a validation set."""
    check_data_dir(settings)
    try:
        open_map(settings)
    except (InvalidInput, OSError) as error:
        raise SettingsError(f"map: {error}") from error
    try:
        check_embedder(settings.embedder)
    except InvalidInput as error:
        raise SettingsError(f"embedder: {error}") from error
    try:
        if settings.validation_set != "builtin":
            load_validation_set(Path(settings.validation_set))
    except (InvalidInput, OSError) as error:
        raise SettingsError(f"validation_set: {error}") from error
    for number, entry in enumerate(settings.model_list):
        stated = entry.litellm_params.get("ssl_verify")
        try:
            if stated is not None and not is_reference(stated):
                ssl_context(trust_of(stated, os.environ), os.environ)
        except OutboundError as error:
            raise SettingsError(f"model_list[{number}].litellm_params.ssl_verify: {error}") from None


def check_data_dir(settings: Settings) -> None:
    """Close the data folder to other users. Raises SettingsError where that cannot be done."""
    try:
        private_folder(settings.data_dir)
    except NotPrivate as error:
        raise SettingsError(f"data_dir: {error}") from error


def check_named_models(
    settings: Settings, served: Collection[str], is_priced: Callable[[str], bool], *, complete: bool
) -> None:
    """Check that the models which settings name are there, or can come.

    Args:
        served: names of the configured and the stored models.
        is_priced: whether LiteLLM's price map knows a name.
        complete: whether the store could be read; else a model may be there that nobody has seen yet.

    Raises:
        SettingsError: a name is a slip of another, or nobody could ever add a model of this name.
    """
    judge, default = settings.judge_model, settings.default_model
    if judge is not None and "/" not in judge and judge not in served and not is_priced(judge) and complete:
        near = _near(judge, served)
        raise SettingsError(f"judge_model: {judge!r} is no registered model and no name of LiteLLM's{near}")
    if default is None or default in served:
        return
    near = _near(default, served)
    if complete and (near or settings.admin_key is None):
        raise SettingsError(f"default_model: no model is named {default!r}{near or _known(served)}")
    settings_log.warning("default_model: no model is named %r yet; until one is added nothing stands in", default)


def _near(name: str, known: Collection[str]) -> str:
    found = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.8)
    return f"; did you mean {found[0]!r}?" if found else ""


def _known(names: Collection[str]) -> str:
    return f"; known models: {', '.join(sorted(names)[:20])}" if names else "; no model is configured"
