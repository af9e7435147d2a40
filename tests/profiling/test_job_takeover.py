from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from proxy.profiling.job_store import (
    GIVEN_UP,
    MAX_TRIES,
    OPEN,
    JobStore,
    LeaseLost,
    Leases,
    PromptAnswer,
    job_key,
    lease_key,
)
from proxy.storage.redis import PROFILES, Store
from proxy.storage.valkey import EmbeddedValkey
from router_core.profiles import Profile
from tests.support.makers import a_record
from tests.support.profiling import a_bench, ended, knows, model_at, settings_for
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import until


def prompts_sent(upstream: ScriptedUpstream) -> Counter[str]:
    return Counter(request.body["messages"][-1]["content"] for request in upstream.history)


def figures(profile: Profile) -> list[list[float]]:
    return [profile.error_sums.tolist(), profile.labels.tolist(), profile.token_sums.tolist()]


finished = partial(ended, timeout_s=120.0)


async def an_uninterrupted_profile(store: Store, folder: Path, upstream: ScriptedUpstream) -> Profile:
    async with a_bench(store, folder, model_at(upstream.url)) as bench:
        job = await finished(bench.jobs, await bench.jobs.submit("small", 40, 1.0))
        assert job.state == "ready"
        await until(lambda: "small" in bench.state.current.profiles)
        return bench.state.current.profiles["small"]


@asynccontextmanager
async def a_killed_worker(folder: Path, upstream: ScriptedUpstream, after: int) -> AsyncIterator[None]:
    """Kill a process that owned store and job, with its server, after so many prompts."""
    command = [sys.executable, "-m", "tests.support.job_runner", str(folder), upstream.url]
    runner = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    await until(lambda: len(upstream.history) >= after)
    server = await _server_pid(folder)
    runner.kill()
    os.kill(server, signal.SIGKILL)
    await runner.wait()
    yield


async def _server_pid(folder: Path) -> int:
    store = Store(f"unix://{EmbeddedValkey(folder).socket_path}")
    info = await store.client.info("server")
    await store.close()
    return int(info["process_id"])


async def test_after_kill_9_of_all_processes_the_job_resumes_to_the_same_profile(store: Store, tmp_path: Path) -> None:
    with ScriptedUpstream(knows("north", "west"), slow_s=0.05) as upstream:
        async with a_killed_worker(tmp_path, upstream, after=12):
            restarted = await Store.open(settings_for(tmp_path))
            job = await JobStore(restarted).for_model("small")
            assert job is not None
            kept = await JobStore(restarted).answers(job.id)
            assert len(kept) >= 8
            before = len(upstream.history)
            async with a_bench(restarted, tmp_path, model_at(upstream.url)) as bench:
                await until(lambda: len(upstream.history) > before)
                assert (await finished(bench.jobs, job)).state == "ready"
                await until(lambda: "small" in bench.state.current.profiles)
                resumed = bench.state.current.profiles["small"]
            await restarted.close()
    texts = {f"{('north', 'east', 'south', 'west')[int(p[1:]) % 4]} say the number {p[1:]}" for p in kept}
    again = prompts_sent(upstream)
    assert all(again[text] == 1 for text in texts)
    assert len(again) == 40
    with ScriptedUpstream(knows("north", "west")) as upstream:
        assert figures(resumed) == figures(await an_uninterrupted_profile(store, tmp_path, upstream))


async def test_a_stopping_worker_gives_its_job_back_at_once(store: Store, second_store: Store, tmp_path: Path) -> None:
    with ScriptedUpstream(knows("north"), slow_s=0.05) as upstream:
        record = model_at(upstream.url)
        async with (
            a_bench(store, tmp_path, record) as one,
            a_bench(second_store, tmp_path, record, worker=False) as two,
        ):
            job = await one.jobs.submit("small", 40, 1.0)
            await until(lambda: len(upstream.history) >= 4)
            await one.jobs.worker.stop()
            seen = len(upstream.history)
            two.jobs.start_worker()
            await until(lambda: len(upstream.history) > seen)
            assert (await finished(two.jobs, job)).state == "ready"


async def test_two_workers_never_ask_the_same_prompt(store: Store, second_store: Store, tmp_path: Path) -> None:
    with ScriptedUpstream(knows("north"), slow_s=0.02) as upstream:
        record = model_at(upstream.url)
        async with a_bench(store, tmp_path, record) as one, a_bench(second_store, tmp_path, record) as two:
            job = await one.jobs.submit("small", 40, 1.0)
            for _ in range(5):
                await two.jobs.worker.enqueue(job.id)
            assert (await finished(two.jobs, job)).done == 40
    assert set(prompts_sent(upstream).values()) == {1}


async def test_a_job_survives_a_restart_of_redis(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path / "elsewhere")
    await asyncio.to_thread(server.ensure)
    store = Store(f"unix://{server.socket_path}")
    with ScriptedUpstream(knows("north"), slow_s=0.05) as upstream:
        async with a_bench(store, tmp_path, model_at(upstream.url)) as bench:
            job = await bench.jobs.submit("small", 40, 1.0)
            await until(lambda: len(upstream.history) >= 8)
            await asyncio.to_thread(server.stop)
            await until(lambda: not bench.state.available)
            await asyncio.to_thread(server.ensure)
            over = await finished(bench.jobs, job)
    assert (over.state, over.done) == ("ready", 40)
    assert set(prompts_sent(upstream).values()) == {1}
    await store.close()
    await asyncio.to_thread(server.stop)


async def test_an_emptied_store_ends_its_jobs_and_takes_new_ones(store: Store, tmp_path: Path) -> None:
    with ScriptedUpstream(knows("north"), slow_s=0.05) as upstream:
        async with a_bench(store, tmp_path, model_at(upstream.url)) as bench:
            await bench.jobs.submit("small", 40, 1.0)
            await until(lambda: len(upstream.history) >= 4)
            await store.client.flushall()
            await until(lambda: not bench.jobs.worker._working)
            await bench.registry.add_model(bench.record)
            assert (await finished(bench.jobs, await bench.jobs.submit("small", 20, 1.0))).state == "ready"


async def test_a_worker_without_the_lease_can_write_nothing(store: Store, tmp_path: Path) -> None:
    ledger, leases = JobStore(store), Leases(store)
    job_id = await ledger.submit((a_record(),), 20, 1.0)
    old = await leases.take(job_id)
    assert old is not None
    assert await leases.take(job_id) is None
    await leases.release(old)
    new = await leases.take(job_id)
    assert new is not None
    assert not await leases.renew(old)
    for write in (
        ledger.begin(old, 20, priced=True),
        ledger.reserve(old, "p1", 0.1),
        ledger.checkpoint(old, "p1", PromptAnswer(score=1.0), None),
        ledger.fail(old, "too late"),
    ):
        with pytest.raises(LeaseLost):
            await write
    assert await ledger.answers(job_id) == {}
    assert await store.client.hlen(PROFILES) == 0


async def test_money_that_a_dead_worker_reserved_counts_as_spent(store: Store, tmp_path: Path) -> None:
    ledger, leases = JobStore(store), Leases(store)
    job_id = await ledger.submit((a_record(),), 20, 1.0)
    dead = await leases.take(job_id)
    assert dead is not None
    await ledger.begin(dead, 20, priced=True)
    await ledger.reserve(dead, "p1", 0.25)
    await ledger.reserve(dead, "p2", 0.5)
    await ledger.checkpoint(dead, "p1", PromptAnswer(score=1.0, cost_usd=0.125), None)
    await leases.release(dead)
    heir = await leases.take(job_id)
    assert heir is not None
    await ledger.begin(heir, 20, priced=True)
    job = await ledger.get(job_id)
    assert job is not None
    assert job.spent_usd == 0.625


async def test_work_ends_before_a_lease_that_cannot_be_renewed_does(store: Store, tmp_path: Path) -> None:
    ledger, leases = JobStore(store), Leases(store)
    lease = await leases.take(await ledger.submit((a_record(),), 20, 1.0))
    assert lease is not None
    work = asyncio.create_task(asyncio.Event().wait())
    holding = asyncio.create_task(leases.hold(lease, work))
    await ledger.cancel(lease.job_id)
    await until(holding.done)
    assert isinstance(holding.exception(), LeaseLost)
    assert work.cancelled()


async def taken_and_lost(store: Store, leases: Leases, job_id: str) -> bool:
    """Take a job as a worker that dies; False if nothing is left to take."""
    taken = await leases.take(job_id) is not None
    await store.client.delete(lease_key(job_id))
    return taken


async def test_a_job_whose_workers_die_is_given_up_and_says_so(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    ledger, leases = JobStore(store), Leases(store)
    job_id = await ledger.submit((a_record(),), 20, 1.0)
    first = await leases.take(job_id)
    assert first is not None
    await ledger.begin(first, 20, priced=True)
    await ledger.reserve(first, "p1", 0.25)
    await store.client.delete(lease_key(job_id))
    tries = [await taken_and_lost(store, leases, job_id) for _ in range(MAX_TRIES)]
    job = await ledger.get(job_id)

    assert tries == [*[True] * (MAX_TRIES - 1), False]
    assert job is not None
    assert (job.state, job.spent_usd) == ("failed", 0.25)
    assert f"given up after {MAX_TRIES} tries" in (job.error or "")
    assert GIVEN_UP in caplog.text
    assert not await store.client.sismember(OPEN, job_id)
    assert await ledger.submit((a_record(),), 20, 1.0) != job_id


async def test_giving_a_job_back_does_not_count_as_a_try(store: Store) -> None:
    ledger, leases = JobStore(store), Leases(store)
    job_id = await ledger.submit((a_record(),), 20, 1.0)
    for _ in range(2 * MAX_TRIES):
        lease = await leases.take(job_id)
        assert lease is not None
        await leases.release(lease)


@pytest.mark.parametrize("stored", ["", "nan", "-5", "1e99", "many", "-inf"])
async def test_an_invalid_count_of_tries_starts_again(store: Store, stored: str) -> None:
    ledger, leases = JobStore(store), Leases(store)
    job_id = await ledger.submit((a_record(),), 20, 1.0)
    await store.client.hset(job_key(job_id), "tries", stored)
    lease = await leases.take(job_id)
    assert lease is not None
    await store.client.hset(job_key(job_id), "tries", stored)
    await leases.release(lease)

    assert await leases.take(job_id)
