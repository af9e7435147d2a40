from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from proxy.profiling.job_store import JOBS, JobStore, Leases, PromptAnswer, ReusedAnswers
from proxy.storage.redis import PREVIOUS_PROFILES, Store
from proxy.storage.valkey import EmbeddedValkey
from tests.support.makers import CORNERS, a_profile, a_record
from tests.support.profiling import a_bench, ended, knows, model_at
from tests.support.scripted_answers import Step
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.two_maps import HALVES, latest_job, measured_on_corners, profile_in_use
from tests.support.waiting import until


def half_right(slow_s: float = 0.0) -> ScriptedUpstream:
    return ScriptedUpstream(knows("north", "east"), slow_s=slow_s)


async def test_however_many_processes_start_at_once_there_is_one_job(store: Store, tmp_path: Path) -> None:
    with half_right() as upstream:
        upstream.then(Step(status=404))
        record = a_record(source="config", api_base=upstream.url)
        await measured_on_corners(store, tmp_path, record)
        async with AsyncExitStack() as closing:
            stores = [Store(store.url) for _ in range(4)]
            for each in stores:
                closing.push_async_callback(each.close)
            started = [a_bench(each, tmp_path, record, cluster_map=HALVES) for each in stores]
            benches = await asyncio.gather(*(closing.enter_async_context(bench) for bench in started))
            await asyncio.gather(*(profile_in_use(bench) for bench in benches))
            assert [await bench.jobs.migrate_profile("small") for bench in benches] == [False] * 4
    assert await store.client.zcard(JOBS) == 2
    assert len(upstream.history) == 25


async def test_a_process_that_read_before_another_submitted_submits_nothing(store: Store, tmp_path: Path) -> None:
    with half_right() as upstream:
        record = model_at(upstream.url)
        await measured_on_corners(store, tmp_path, record)
        outdated = ReusedAnswers("the-job-before", HALVES.id, {"p1": PromptAnswer(score=1.0)}, None)
        assert await JobStore(store).submit((record,), 1, 0.0, outdated) == ""
    assert await store.client.zcard(JOBS) == 1


async def test_a_process_on_the_old_map_keeps_its_profile_and_leaves_the_job_to_the_others(
    store: Store, second_store: Store, tmp_path: Path
) -> None:
    with half_right() as upstream:
        record = model_at(upstream.url)
        old = await measured_on_corners(store, tmp_path, record)
        async with (
            a_bench(store, tmp_path, record) as before,
            a_bench(second_store, tmp_path, record, cluster_map=HALVES, worker=False) as after,
        ):
            assert await after.jobs.migrate_profile("small")
            job = await latest_job(after)
            await before.jobs.worker.enqueue(job.id)
            assert await Leases(store, CORNERS.id).take(job.id) is None
            after.jobs.start_worker()
            assert (await profile_in_use(after)).map_id == HALVES.id
            await before.state.refresh()
            assert before.state.current.profiles["small"].to_json() == old.to_json()
            assert before.state.current.model_state("small") == "ready"
    assert len(upstream.history) == 24


async def test_going_back_to_the_old_map_needs_no_job(store: Store, tmp_path: Path) -> None:
    with half_right() as upstream:
        record = model_at(upstream.url)
        old = await measured_on_corners(store, tmp_path, record)
        async with a_bench(store, tmp_path, record, cluster_map=HALVES) as bench:
            await profile_in_use(bench)
        async with a_bench(store, tmp_path, record) as bench:
            assert (await profile_in_use(bench)).to_json() == old.to_json()
    assert await store.client.zcard(JOBS) == 2


async def test_profiling_again_on_the_new_map_outdates_the_old_maps_profile(store: Store, tmp_path: Path) -> None:
    with half_right() as upstream:
        record = model_at(upstream.url)
        await measured_on_corners(store, tmp_path, record)
        async with a_bench(store, tmp_path, record, cluster_map=HALVES) as bench:
            await profile_in_use(bench)
            upstream.skill = knows("north", "east", "south", "west")
            assert (await ended(bench.jobs, await bench.jobs.submit("small", 24, 1.0))).state == "ready"
        assert len(upstream.history) == 48
        async with a_bench(store, tmp_path, record) as bench:
            assert (await profile_in_use(bench)).error_sums.sum() == 0
    assert len(upstream.history) == 48


async def test_profiling_again_replaces_a_migration_job(store: Store, tmp_path: Path) -> None:
    with half_right() as upstream:
        record = model_at(upstream.url)
        await measured_on_corners(store, tmp_path, record)
        async with a_bench(store, tmp_path, record, cluster_map=HALVES, worker=False) as bench:
            assert await bench.jobs.migrate_profile("small")
            carrying = await latest_job(bench)
            anew = await bench.jobs.submit("small", 24, 1.0)
            assert await bench.jobs.migrate_profile("small")
            assert (await latest_job(bench)).id == anew.id
            replaced = await bench.jobs.get(carrying.id)
            bench.jobs.start_worker()
            assert (await ended(bench.jobs, anew)).done == 24
    assert replaced is not None
    assert (replaced.state, replaced.error) == ("cancelled", "a newer job took its place")
    assert len(upstream.history) == 48


async def test_another_process_finishes_a_migration_and_asks_no_prompt_twice(
    store: Store, second_store: Store, tmp_path: Path
) -> None:
    with half_right(slow_s=0.1) as upstream:
        upstream.then(*[Step(status=404)] * 4)
        record = a_record(source="config", api_base=upstream.url)
        await measured_on_corners(store, tmp_path, record)
        one_at_a_time = {"concurrency": 1}
        async with a_bench(store, tmp_path, record, cluster_map=HALVES, profile=one_at_a_time) as one:
            await until(lambda: len(upstream.history) >= 26)
            assert (await latest_job(one)).done >= 21
        async with a_bench(second_store, tmp_path, record, cluster_map=HALVES, profile=one_at_a_time) as heir:
            assert (await profile_in_use(heir)).total_labels == 24
            assert (await latest_job(heir)).done == 24
    assert await store.client.zcard(JOBS) == 2
    assert 28 <= len(upstream.history) <= 29


async def test_a_job_that_a_change_of_map_interrupted_asks_only_the_rest(
    store: Store, second_store: Store, tmp_path: Path
) -> None:
    with half_right(slow_s=0.05) as upstream:
        record = model_at(upstream.url)
        async with a_bench(store, tmp_path, record, profile={"concurrency": 1}) as dying:
            job = await dying.jobs.submit("small", 24, 1.0)
            await until(lambda: len(upstream.history) >= 12)
        async with a_bench(second_store, tmp_path, record, cluster_map=HALVES) as heir:
            assert (await ended(heir.jobs, job)).done == 24
            assert (await profile_in_use(heir)).total_labels == 24
    assert len({request.body["messages"][0]["content"] for request in upstream.history}) in (24, 25)


async def test_a_store_that_is_away_at_the_start_is_waited_for(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path / "elsewhere")
    await asyncio.to_thread(server.ensure)
    store = Store(f"unix://{server.socket_path}")
    with half_right() as upstream:
        record = a_record(source="config", api_base=upstream.url)
        await measured_on_corners(store, tmp_path, record)
        await asyncio.to_thread(server.stop)
        async with a_bench(store, tmp_path, record, cluster_map=HALVES) as bench:
            assert not bench.state.available
            await asyncio.to_thread(server.ensure)
            await profile_in_use(bench)
    assert len(upstream.history) == 24
    await store.close()
    await asyncio.to_thread(server.stop)


@pytest.mark.parametrize("handed_over", [True, False])
async def test_a_removed_or_reprofiled_model_leaves_nothing_of_the_old_map(
    store: Store, tmp_path: Path, handed_over: bool
) -> None:
    with half_right() as upstream:
        record = model_at(upstream.url)
        await measured_on_corners(store, tmp_path, record)
        async with a_bench(store, tmp_path, record, cluster_map=HALVES) as bench:
            await profile_in_use(bench)
            assert await store.client.hlen(PREVIOUS_PROFILES) == 1
            if handed_over:
                await bench.registry.put_profile(record, a_profile((0.5, 0.5), HALVES.id))
            else:
                await bench.registry.remove_model("small")
    assert await store.client.hlen(PREVIOUS_PROFILES) == 0
