from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from proxy.server.metrics import Values
from proxy.server.quality_watch import QualityWatch
from proxy.storage.feedback import FeedbackLimits, FeedbackStore, Labels, owner_of
from proxy.storage.redis import Store
from tests.support.makers import CORNERS, a_profile, a_record, a_registry, started_watcher

LIMITS = FeedbackLimits(half_life_s=86_400, labels_per_key=1000, calls_per_minute=10_000, ttl_s=3600)
RECORD = a_record("small")
NOW = int(time.time() // 3600)


@asynccontextmanager
async def watch(store: Store, folder: Path) -> AsyncIterator[tuple[QualityWatch, FeedbackStore]]:
    """Watch one model that was measured to be wrong on a tenth of all prompts."""
    registry = a_registry(store, folder)
    await registry.add_model(RECORD)
    await registry.put_profile(RECORD, a_profile((0.1,) * 4))
    async with started_watcher(store, folder) as snapshots:
        feedback = FeedbackStore(store, LIMITS)
        yield QualityWatch(feedback, snapshots, Values()), feedback


async def grade(feedback: FeedbackStore, hour: int, right: int, wrong: int) -> None:
    owner = owner_of(CORNERS.id, RECORD.fingerprint)
    for number in range(right + wrong):
        labels = Labels(owner, float(number < wrong), {0: 1.0}, expected=0.1, hour=NOW + hour)
        said = {"score": float(number >= wrong), "source": None, "at": 1.0}
        await feedback.give(f"dec-{hour}-{number}", "small", "k", said, labels)


def shown(found: QualityWatch) -> dict[str, float]:
    (family,) = found.collect()
    return {sample.labels["model"]: sample.value for sample in family.samples}


async def test_a_model_that_became_worse_is_in_the_metrics_and_told_once(
    store: Store, second_store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "uniroute.quality")
    async with watch(store, tmp_path) as (found, feedback), started_watcher(second_store, tmp_path) as snapshots:
        await grade(feedback, -3, 36, 4)
        await found.look()
        assert (shown(found), caplog.messages) == ({"small": 0}, [])

        await grade(feedback, 0, 10, 20)
        for each in (found, QualityWatch(FeedbackStore(second_store, LIMITS), snapshots, Values()), found):
            await each.look()
            assert shown(each) == {"small": 1}

    (line,) = caplog.messages
    assert line.startswith("model small became worse by feedback: Since 20")
    assert "67% of its answers are graded wrong (30 labels), and before 10% (40 labels)" in line


async def test_a_model_is_in_the_metrics_before_it_was_compared(store: Store, tmp_path: Path) -> None:
    async with watch(store, tmp_path) as (found, _):
        assert shown(found) == {"small": 0}


async def test_a_model_that_is_as_measured_or_has_too_few_labels_is_not_told(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with watch(store, tmp_path) as (found, feedback):
        await found.look()
        await grade(feedback, -1, 0, 9)
        await found.look()
        assert (shown(found), caplog.messages) == ({"small": 0}, [])


async def test_a_model_that_became_better_is_told_and_is_no_alarm(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with watch(store, tmp_path) as (found, feedback):
        await grade(feedback, -3, 20, 20)
        await grade(feedback, 0, 40, 0)
        await found.look()
        assert shown(found) == {"small": 0}
    assert "became better" in caplog.text
