"""What a server refuses to start with: files and models that its settings name and that are not there."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path

from proxy.settings.models import SettingsError
from proxy.settings.outbound import OutboundError, ssl_context, trust_of
from proxy.settings.redaction import is_reference
from proxy.settings.schema import Settings
from proxy.storage.private_files import NotPrivate, private_folder
from router_core.artifact import builtin_map, load_map
from router_core.clustering import ClusterMap
from router_core.embedding import check_embedder
from router_core.errors import InvalidInput
from router_core.estimators import ESTIMATORS
from router_core.text import closest_name
from router_core.validation.loading import load_validation_set

log = logging.getLogger("uniroute.settings")


def load_cluster_map(settings: Settings) -> ClusterMap:
    """Load the map of `settings.map`; a hard recipe puts each prompt wholly in one cluster.

    Raises:
        RouterCoreError, OSError: the map cannot be read.
    """
    chosen = builtin_map() if settings.map == "builtin" else load_map(Path(settings.map))
    return chosen.with_hard_assignment() if ESTIMATORS[settings.recipe].hard else chosen


def validate_files(settings: Settings) -> None:
    """Check every file that settings name.

    Raises:
        SettingsError: naming the setting whose file is missing or broken, with the line of a validation set.
    """
    check_data_dir(settings)
    try:
        load_cluster_map(settings)
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
    for index, model in enumerate(settings.model_list):
        trusted = model.litellm_params.get("ssl_verify")
        try:
            if trusted is not None and not is_reference(trusted):
                ssl_context(trust_of(trusted, os.environ), os.environ)
        except OutboundError as error:
            raise SettingsError(f"model_list[{index}].litellm_params.ssl_verify: {error}") from None


def check_data_dir(settings: Settings) -> None:
    """Close the data folder to other users.

    Raises:
        SettingsError: it cannot be made, or cannot be closed.
    """
    try:
        private_folder(settings.data_dir)
    except NotPrivate as error:
        raise SettingsError(f"data_dir: {error}") from error


def check_named_models(
    settings: Settings, served: Collection[str], is_priced: Callable[[str], bool], *, complete: bool
) -> None:
    """Check that the models which settings name are there, or can still be added.

    Args:
        served: names of the configured and the stored models.
        is_priced: whether LiteLLM's price map knows a name.
        complete: whether the store could be read; if not, there may be models that are not in `served`.

    Raises:
        SettingsError: a name is a misspelling of another, or no model of this name can ever be added.
    """
    judge, default = settings.judge_model, settings.default_model
    if judge is not None and "/" not in judge and judge not in served and not is_priced(judge) and complete:
        hint = _did_you_mean(judge, served)
        raise SettingsError(f"judge_model: {judge!r} is no registered model and no name of LiteLLM's{hint}")
    if default is None or default in served:
        return
    hint = _did_you_mean(default, served)
    if complete and (hint or settings.admin_key is None):
        raise SettingsError(f"default_model: no model is named {default!r}{hint or _known_models(served)}")
    log.warning("default_model: no model is named %r yet; until one is added nothing stands in", default)


def _did_you_mean(name: str, known: Collection[str]) -> str:
    closest = closest_name(name, known, min_similarity=0.8)
    return f"; did you mean {closest!r}?" if closest else ""


def _known_models(names: Collection[str]) -> str:
    return f"; known models: {', '.join(sorted(names)[:20])}" if names else "; no model is configured"
