from __future__ import annotations

import ctypes
import logging
import math
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxy.errors import Starting
from proxy.settings.outbound import OutboundError, ssl_context, trust_of
from proxy.settings.redaction import is_reference
from proxy.settings.schema import Settings
from proxy.storage.price_map import bundled_price_map
from proxy.storage.private_files import NotPrivate, private_folder
from proxy.storage.records import InvalidRecord, ModelRecord
from proxy.storage.variants import variants_of
from router_core.artifact import builtin_map, load_map
from router_core.clustering import ClusterMap
from router_core.embedding import check_embedder
from router_core.errors import InvalidInput
from router_core.estimators import ESTIMATORS
from router_core.text import closest_name
from router_core.validation.loading import load_validation_set

if TYPE_CHECKING:
    from proxy.server.dependencies import AppState


MAX_RETRY_AFTER_S = 60

# The exit status of a process that could not start, as uvicorn has it.
START_FAILED = 3


@dataclass
class Step:
    """A step of the start; several may be under way at once. `total` is 0 while it is unknown."""

    what: str
    unit: str
    began: float
    done: int = 0
    total: int = 0

    def update(self, done: int, total: int) -> None:
        self.done, self.total = done, total

    def to_json(self) -> dict[str, Any]:
        return {"what": self.what, **({"done": self.done, "total": self.total} if self.total else {})}

    def __str__(self) -> str:
        return f"{self.what} ({self.done} of {self.total} {self.unit})" if self.total else self.what


class Startup:
    """The progress of one start, written by the task that opens the app's state and by its threads.

    Args:
        app_state: the state, if it is open already.
    """

    def __init__(self, app_state: AppState | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.app_state = app_state
        self._clock = clock
        self._steps: list[Step] = []
        self.failure: Exception | None = None
        """The exception that ended the start."""
        self.shutting_down = False
        """Answers that would go on for long should end: the server waits for them."""

    @contextmanager
    def step(self, what: str, unit: str = "", total: int = 0) -> Iterator[Step]:
        step = Step(what, unit, self._clock(), total=total)
        self._steps.append(step)
        try:
            yield step
        finally:
            self._steps.remove(step)

    def to_json(self) -> dict[str, Any]:
        """Return the body of /readyz during the start."""
        return {"status": "starting", "under_way": [step.to_json() for step in tuple(self._steps)]}

    def refusal(self) -> Starting:
        """Return the error that answers every call which needs the services."""
        steps = tuple(self._steps)
        doing = ": " + ", ".join(map(str, steps)) if steps else ""
        retry_after_s = max((self._left_s(step) for step in steps), default=1)
        message = f"this server is starting{doing}; try again, and see /readyz"
        return Starting(message, headers={"retry-after": str(retry_after_s)})

    def _left_s(self, step: Step) -> int:
        """Estimate how long the rest of a step takes, at its rate so far."""
        if not 0 < step.done < step.total:
            return 1
        left_s = (self._clock() - step.began) / step.done * (step.total - step.done)
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(left_s)))


def return_freed_memory() -> None:
    """Return what loading has used and freed to the system. glibc keeps it, ten MiB and more; others have no call."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


log = logging.getLogger("uniroute.settings")


def load_cluster_map(settings: Settings) -> ClusterMap:
    """Load the map of `settings.map`; a hard recipe puts each prompt wholly in one cluster.

    Raises:
        RouterCoreError, OSError: the map cannot be read.
    """
    chosen = builtin_map(settings.embedder) if settings.map == "builtin" else load_map(Path(settings.map))
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
        raise settings.refusal(f"map: {error}") from error
    try:
        check_embedder(settings.embedder)
    except InvalidInput as error:
        raise settings.refusal(f"embedder: {error}") from error
    try:
        if settings.validation_set != "builtin":
            load_validation_set(Path(settings.validation_set))
    except (InvalidInput, OSError) as error:
        raise settings.refusal(f"validation_set: {error}") from error
    check_efforts(settings)
    for index, model in enumerate(settings.model_list):
        trusted = model.litellm_params.get("ssl_verify")
        try:
            if trusted is not None and not is_reference(trusted):
                ssl_context(trust_of(trusted, os.environ), os.environ)
        except OutboundError as error:
            raise settings.refusal(f"model_list[{index}].litellm_params.ssl_verify: {error}") from None


def check_efforts(settings: Settings) -> None:
    """Check that the configured models can have the efforts that are stated of them.

    Raises:
        SettingsError: naming the model.
    """
    names = {model.model_name for model in settings.model_list}
    for index, model in enumerate(settings.model_list):
        if model.model_info.effort is None:
            continue
        listed = bundled_price_map().find(model.litellm_params["model"])
        try:
            efforts = variants_of(ModelRecord.of_entry(model, "config", 0.0), listed)
        except InvalidRecord as error:
            raise settings.refusal(f"model_list[{index}].{error}") from None
        if taken := [each.name for each in efforts if each.name in names]:
            raise settings.refusal(
                f"model_list[{index}].model_info.effort: {taken[0]!r} is also a model; leave that effort out, or give"
                " one of the two another name"
            )


def check_data_dir(settings: Settings) -> None:
    """Close the data folder to other users.

    Raises:
        SettingsError: it cannot be made, or cannot be closed.
    """
    try:
        private_folder(settings.data_dir)
    except NotPrivate as error:
        raise settings.refusal(f"data_dir: {error}") from error


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
        raise settings.refusal(f"judge_model: {judge!r} is no registered model and no name of LiteLLM's{hint}")
    for name, preset in settings.presets.items():
        for model in preset.models or ():
            _check_preset_model(f"presets.{name}.models", model, settings, served, complete=complete)
    if default is None or default in served:
        return
    hint = _did_you_mean(default, served)
    if complete and (hint or settings.admin_key is None):
        raise settings.refusal(f"default_model: no model is named {default!r}{hint or _known_models(served)}")
    where = settings.origin("default_model")
    log.warning("%s: no model is named %r yet; until one is added nothing stands in", where, default)


def _check_preset_model(where: str, name: str, settings: Settings, served: Collection[str], *, complete: bool) -> None:
    if name in served:
        return
    hint = _did_you_mean(name, served)
    if complete and (hint or settings.admin_key is None):
        raise settings.refusal(f"{where}: no model is named {name!r}{hint or _known_models(served)}")
    log.warning("%s: no model is named %r yet", settings.origin(where), name)


def _did_you_mean(name: str, known: Collection[str]) -> str:
    closest = closest_name(name, known, min_similarity=0.8)
    return f"; did you mean {closest!r}?" if closest else ""


def _known_models(names: Collection[str]) -> str:
    return f"; known models: {', '.join(sorted(names)[:20])}" if names else "; no model is configured"
