from __future__ import annotations

from pathlib import Path

import pytest

from proxy.profiling.grading import ValidationPrompts
from proxy.profiling.job_store import JOBS, JobStore, answers_key, job_key
from proxy.storage.profile_history import read_history
from proxy.storage.records import ModelRecord
from proxy.storage.redis import Store
from tests.support.makers import CORNERS, a_profile, a_record
from tests.support.profiling import CornersEmbedder, a_bench, ended, knows, model_at, write_validation_set
from tests.support.scripted_answers import Step
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.two_maps import HALVES, latest_job, measured_on_corners, profile_in_use
from tests.support.waiting import until


def half_right() -> ScriptedUpstream:
    return ScriptedUpstream(knows("north", "east"))


async def is_left_alone(store: Store, folder: Path, record: ModelRecord, caplog: pytest.LogCaptureFixture) -> bool:
    """Tell whether a process on the new map says what to do, and does nothing."""
    jobs_before = await store.client.zcard(JOBS)
    async with a_bench(store, folder, record, cluster_map=HALVES) as bench:
        await until(lambda: "`uniroute models profile small` measures it" in caplog.text)
        foreign = bench.state.current.model_state("small") == "foreign_profile"
    return foreign and await store.client.zcard(JOBS) == jobs_before


async def test_answers_on_the_old_map_make_a_profile_on_the_new_one(store: Store, tmp_path: Path) -> None:
    with half_right() as upstream:
        before = await measured_on_corners(store, tmp_path, model_at(upstream.url))
        async with a_bench(store, tmp_path, model_at(upstream.url), cluster_map=HALVES) as bench:
            profile, job = await profile_in_use(bench), await latest_job(bench)
            lines = await bench.jobs.outcomes(job.id)
    assert len(upstream.history) == len(lines) == 24
    assert (job.state, job.done, job.total, job.spent_usd) == ("ready", 24, 24, 0)
    assert (profile.map_id, profile.measured_at) == (HALVES.id, before.measured_at)
    history = [(each.source, each.map_id, each.measured_at) for each in await read_history(store, "small")]
    assert history == [
        (source, id_, before.measured_at) for source, id_ in (("carried_over", HALVES.id), ("job", before.map_id))
    ]
    assert profile.total_labels == pytest.approx(before.total_labels)
    assert (profile.error_sums[0], profile.error_sums[1]) == (0, profile.labels[1])


async def test_a_configured_model_is_asked_only_unanswered_prompts(store: Store, tmp_path: Path) -> None:
    with half_right() as upstream:
        upstream.then(Step(status=404), Step(finish_reason="length"))
        record = model_at(upstream.url)
        configured = a_record(source="config", api_base=upstream.url)
        await measured_on_corners(store, tmp_path, record)
        async with a_bench(store, tmp_path, configured, cluster_map=HALVES) as bench:
            await profile_in_use(bench)
            job = await latest_job(bench)
    assert (job.done, job.total, job.failed, job.unlabelled) == (24, 24, 0, 1)
    assert len(upstream.history) == 25
    assert 0 < (job.spent_usd or 0) < 0.0001


@pytest.mark.parametrize("source", ["config", "admin"])
async def test_enough_recorded_answers_make_a_profile_without_new_prompts(
    store: Store, tmp_path: Path, source: str
) -> None:
    with half_right() as upstream:
        upstream.then(Step(status=404))
        record = a_record(source=source, api_base=upstream.url)
        await measured_on_corners(store, tmp_path, record)
        async with a_bench(
            store, tmp_path, record, cluster_map=HALVES, profile={"on_start": source == "admin"}
        ) as bench:
            assert (await profile_in_use(bench)).total_labels == pytest.approx(23)
            assert (await latest_job(bench)).total == 23
    assert len(upstream.history) == 24


async def test_a_model_without_a_price_is_migrated_because_nothing_is_asked(store: Store, tmp_path: Path) -> None:
    with half_right() as upstream:
        record = a_record(info={}, api_base=upstream.url)
        async with a_bench(store, tmp_path, record) as bench:
            await ended(bench.jobs, await bench.jobs.submit("small", 24, None))
        async with a_bench(store, tmp_path, record, cluster_map=HALVES) as bench:
            await profile_in_use(bench)
            assert (await latest_job(bench)).spent_usd is None
    assert len(upstream.history) == 24


async def test_answers_to_prompts_that_left_the_validation_set_are_dropped(store: Store, tmp_path: Path) -> None:
    (tmp_path / "smaller").mkdir()
    write_validation_set(tmp_path / "smaller" / "prompts.jsonl", 22)
    with half_right() as upstream:
        record = model_at(upstream.url)
        await measured_on_corners(store, tmp_path, record, prompts=40)
        async with a_bench(store, tmp_path / "smaller", record, cluster_map=HALVES) as bench:
            assert (await profile_in_use(bench)).total_labels == 22
            assert (await latest_job(bench)).done == 22
    assert len(upstream.history) == 40


async def test_too_few_answers_are_not_migrated_and_the_log_says_what_to_do(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "smaller").mkdir()
    write_validation_set(tmp_path / "smaller" / "prompts.jsonl", 19)
    with half_right() as upstream:
        record = model_at(upstream.url)
        await measured_on_corners(store, tmp_path, record, prompts=40)
        assert await is_left_alone(store, tmp_path / "smaller", record, caplog)
    assert len(upstream.history) == 40


async def test_an_uploaded_profile_is_not_migrated(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with half_right() as upstream:
        record = model_at(upstream.url)
        await measured_on_corners(store, tmp_path, record)
        async with a_bench(store, tmp_path, record, worker=False) as bench:
            await bench.registry.put_profile(record, a_profile())
        assert await is_left_alone(store, tmp_path, record, caplog)


async def test_expired_answers_are_logged(store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with half_right() as upstream:
        record = model_at(upstream.url)
        await measured_on_corners(store, tmp_path, record)
        job = await JobStore(store).for_model("small")
        assert job is not None
        await store.client.delete(job_key(job.id), answers_key(job.id))
        assert await is_left_alone(store, tmp_path, record, caplog)


async def test_a_changed_model_reuses_no_answers(store: Store, tmp_path: Path) -> None:
    with half_right() as upstream:
        await measured_on_corners(store, tmp_path, model_at(upstream.url))
        changed = model_at(upstream.url, temperature=1)
        async with a_bench(store, tmp_path, model_at(upstream.url), cluster_map=HALVES, worker=False) as bench:
            await bench.registry.update_model(changed)
            await bench.state.refresh()
            assert not await bench.jobs.migrate_profile("small")
            assert bench.state.current.model_state("small") == "foreign_profile"


async def test_answered_prompts_are_selected_first_and_the_usual_ones_fill_up(tmp_path: Path) -> None:
    path = write_validation_set(tmp_path / "prompts.jsonl")
    placed = await ValidationPrompts(str(path), CornersEmbedder()).load(CORNERS)
    usual = [prompt.id for prompt in placed.select(24).prompts]
    answered = {"p1", "p2", "p3", "gone"}
    mixed = [prompt.id for prompt in placed.select(10, answered).prompts]
    assert [prompt.id for prompt in placed.select(24, usual[5:9]).prompts] == usual
    assert len(mixed) == 10
    assert {"p1", "p2", "p3"} < set(mixed)
    assert {prompt.id for prompt in placed.select(2, answered).prompts} == {"p1", "p2", "p3"}
