"""The efforts of a model: one registered model, asked in several ways, each with a profile of its own.

They are made of the model's record wherever it is read, and stored nowhere: what is registered is the model. Address,
key, price, pause, concurrency and circuit are the model's own; parameters, profile, lengths of answers and usage are
those of each effort.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import replace

from proxy.settings.effort import AUTO, EFFORTS, Effort, params_of
from proxy.settings.litellm_params import SYNONYMS
from proxy.settings.model_config import EMBEDDING
from proxy.storage.price_map import PriceMapEntry
from proxy.storage.records import InvalidRecord, ModelRecord

# `auto` takes none above: they are seldom worth what it costs to measure them, and can be listed.
_HIGHEST = "high"

_UNKNOWN: tuple[Effort, ...] = ("low", "medium", "high")

# Of Claude that is told how much to think by a budget alone: it has no efforts that mean the same everywhere.
_BUDGETS: tuple[Effort, ...] = ("none", 2048, 8192, 16384)

_PARAMS = next(names for names in SYNONYMS if "reasoning_effort" in names)

MAX_NAME_CHARS = 128


def efforts_of(record: ModelRecord, listed: PriceMapEntry | None) -> tuple[Effort, ...]:
    """Return the efforts at which a model is asked, ascending; none: it is asked as it is.

    Args:
        listed: its entry in litellm's price map.

    Raises:
        InvalidRecord: the model cannot be asked so; the message says what to change.
    """
    stated = record.info.effort
    if stated is None:
        return ()
    if (record.info.mode or (listed and listed.mode)) == EMBEDDING:
        raise InvalidRecord("model_info.effort: a model that answers with embeddings does not think; remove it")
    if fixed := sorted(_PARAMS.intersection(record.litellm_params)):
        raise InvalidRecord(
            f"model_info.effort: litellm_params.{fixed[0]} fixes how much it thinks already; state one of the two"
        )
    if stated != AUTO:
        return stated
    if record.info.supports_reasoning is False or (listed is not None and not _reasons(record, listed)):
        raise InvalidRecord(
            f"model_info.effort: {record.litellm_params['model']!r} is not known to reason, so it has no efforts;"
            " remove it, or state supports_reasoning: true if it does"
        )
    if listed is None:
        return _UNKNOWN
    thinking = listed.thinking
    if "claude" in str(record.litellm_params["model"]).lower() and not (thinking.adaptive or listed.output_config):
        return _BUDGETS
    highest = EFFORTS.index(_HIGHEST)
    return tuple(each for each in thinking.efforts if EFFORTS.index(each) <= highest) or _UNKNOWN


def _reasons(record: ModelRecord, listed: PriceMapEntry) -> bool:
    return record.info.supports_reasoning is True or listed.capabilities.reasoning is True


def variants_of(record: ModelRecord, listed: PriceMapEntry | None) -> tuple[ModelRecord, ...]:
    """Return the record of each effort of a model, ascending. Raises InvalidRecord as `efforts_of` does."""
    variants = tuple(_variant(record, effort) for effort in efforts_of(record, listed))
    for variant in variants:
        if len(variant.name) > MAX_NAME_CHARS:
            raise InvalidRecord(
                f"model_info.effort: the name {variant.name[:40]!r}… of an effort is longer than {MAX_NAME_CHARS}"
                " characters; give the model a shorter name"
            )
    return variants


def _variant(record: ModelRecord, effort: Effort) -> ModelRecord:
    return replace(
        record,
        name=f"{record.name}@{effort}",
        litellm_params={**record.litellm_params, **params_of(effort)},
        info=record.info.model_copy(update={"effort": None, "supports_reasoning": True}),
        base=record.name,
        effort=effort,
    )


class Variants:
    """The efforts of all models, each made once, so that what is kept by record stays."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[ModelRecord, tuple[ModelRecord, ...]]] = {}

    def of(self, record: ModelRecord, listed: PriceMapEntry | None, taken: Collection[str]) -> tuple[ModelRecord, ...]:
        """Return the efforts of a model whose names no registered model has. Raises InvalidRecord."""
        made = self._made.get(record.name)
        if made is None or made[0] is not record:
            made = self._made[record.name] = record, variants_of(record, listed)
        return tuple(each for each in made[1] if each.name not in taken)


def joint_fingerprint(records: Sequence[ModelRecord]) -> str:
    """Return the fingerprint of what a job measures: of one model, or of all efforts of one."""
    if len(records) == 1 and records[0].effort is None:
        return records[0].fingerprint
    together = "\n".join(f"{record.name} {record.fingerprint}" for record in records)
    return hashlib.sha256(together.encode()).hexdigest()[:16]
