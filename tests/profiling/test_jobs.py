from __future__ import annotations

import asyncio
import gc
import json
import time
from pathlib import Path
from typing import Any

import pytest

from proxy.profiling.broker import STREAM
from proxy.profiling.job_store import JobStore
from proxy.storage.profile_history import read_history
from proxy.storage.redis import LATEST_JOBS, PROFILES, Store
from proxy.storage.registry import UnknownModel
from tests.support.makers import a_profile, a_record
from tests.support.profiling import a_bench, ended, knows, model_at, write_validation_set
from tests.support.scripted_answers import Step
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import until


async def until_true(look: Any, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not await look():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.02)


async def test_a_model_is_measured_on_prompts_of_every_cluster_and_is_routable_when_ready(
    store: Store, tmp_path: Path
) -> None:
    with ScriptedUpstream(knows("north", "east")) as upstream:
        async with a_bench(store, tmp_path, model_at(upstream.url)) as bench:
            job = await ended(bench.jobs, await bench.jobs.submit("small", prompts=24, max_usd=1.0))
            assert (job.state, job.done, job.total, job.failed, job.unlabelled) == ("ready", 24, 24, 0, 0)
            await until(lambda: bench.state.current.model_state("small") == "ready")
            errors = bench.state.current.profiles["small"].errors()
            assert errors[:2].max() < 0.25
            assert errors[2:].min() > 0.75
    prompts = [request.body["messages"][0]["content"].split(" ")[0] for request in upstream.history]
    assert {word: prompts.count(word) for word in set(prompts)} == dict.fromkeys(("north", "east", "south", "west"), 6)


async def test_a_paused_model_is_measured_all_the_same(store: Store, tmp_path: Path) -> None:
    with ScriptedUpstream(knows("north")) as upstream:
        async with a_bench(store, tmp_path, model_at(upstream.url)) as bench:
            await bench.registry.pause_model("small", paused=True)
            job = await ended(bench.jobs, await bench.jobs.submit("small", 20, 1.0))
            await until(lambda: bench.state.current.model_state("small") == "ready")
            assert set(bench.state.current.paused) == {"small"}
            assert bench.state.current.pool.routable_rows.size == 0
    assert (job.state, len(upstream.history)) == ("ready", 20)


async def test_each_measurement_joins_the_history_of_the_model_with_what_it_cost(store: Store, tmp_path: Path) -> None:
    with ScriptedUpstream(knows("north", "east")) as upstream:
        async with a_bench(store, tmp_path, model_at(upstream.url), recipe="shrunk") as bench:
            first = await ended(bench.jobs, await bench.jobs.submit("small", 24, 1.0))
            upstream.skill = knows()
            second = await ended(bench.jobs, await bench.jobs.submit("small", 20, 1.0))
            upstream.always = Step(status=401)
            await ended(bench.jobs, await bench.jobs.submit("small", 20, 1.0))
    newest, oldest = await read_history(store, "small")
    assert [(each.source, each.job, each.recipe) for each in (oldest, newest)] == [
        ("job", first.id, "shrunk"),
        ("job", second.id, "shrunk"),
    ]
    assert (oldest.spent_usd, newest.spent_usd) == (first.spent_usd, second.spent_usd)
    assert [oldest.total_labels, newest.total_labels] == pytest.approx([24, 20])
    assert [oldest.error_sums.sum(), newest.error_sums.sum()] == pytest.approx([12, 20], rel=1e-5)


async def test_the_json_of_a_job_has_the_fields_of_the_contract(store: Store, tmp_path: Path) -> None:
    with ScriptedUpstream(knows("north")) as upstream:
        async with a_bench(store, tmp_path, model_at(upstream.url)) as bench:
            job = await ended(bench.jobs, await bench.jobs.submit("small", 20, 1.0))
    fields = json.loads(json.dumps(job.to_json()))
    assert list(fields) == [
        "id",
        "model",
        "state",
        "done",
        "total",
        "failed",
        "unlabelled",
        "spent_usd",
        "eta_s",
        "error",
    ]
    tokens = [len(request.body["messages"][0]["content"].split()) + 3 for request in upstream.history]
    assert fields["spent_usd"] == pytest.approx(sum(tokens) * 1e-6 + 20 * 4 * 4e-6)
    assert (fields["error"], fields["eta_s"]) == (None, 0.0)


async def test_a_model_has_one_unfinished_job_and_a_changed_model_gets_a_new_one(store: Store, tmp_path: Path) -> None:
    async with a_bench(store, tmp_path, a_record(), worker=False) as bench:
        first = await bench.jobs.submit("small", 20, 1.0)
        assert (await bench.jobs.submit("small", 30, 2.0)).id == first.id
        await bench.registry.update_model(a_record(temperature=1))
        second = await bench.jobs.submit("small", 30, 2.0)
        assert second.id != first.id
        replaced = await bench.jobs.get(first.id)
        assert replaced is not None
        assert replaced.state == "cancelled"
        assert await bench.jobs.for_model("small") == second


async def test_an_unknown_model_or_no_prompts_are_refused(store: Store, tmp_path: Path) -> None:
    async with a_bench(store, tmp_path, a_record(), worker=False) as bench:
        with pytest.raises(UnknownModel):
            await bench.jobs.submit("nobody", 20, 1.0)
        with pytest.raises(ValueError, match="1 or more"):
            await bench.jobs.submit("small", 0, 1.0)
        assert await bench.jobs.get("nothing") is None


@pytest.mark.parametrize(
    ("step", "status"),
    [(Step(status=429), 429), (Step(status=401), 401), (Step(status=404), 404), (Step(status=500), 500)],
)
async def test_a_model_that_refuses_everything_fails_early_and_keeps_its_old_profile(
    store: Store, tmp_path: Path, step: Step, status: int
) -> None:
    with ScriptedUpstream() as upstream:
        upstream.always = step
        async with a_bench(store, tmp_path, model_at(upstream.url)) as bench:
            await bench.registry.put_profile(bench.record, a_profile())
            job = await ended(bench.jobs, await bench.jobs.submit("small", 40, 1.0))
            assert job.state == "failed"
            assert f"status {status}" in (job.error or "")
            assert job.done < 10
            assert job.spent_usd == 0
            await bench.state.refresh()
            assert bench.state.current.profiles["small"].mean_error == a_profile().mean_error
    attempts = 3 if status in (429, 500) else 1
    assert len(upstream.history) <= attempts * 9


async def test_a_busy_provider_is_retried_and_loses_no_prompt(store: Store, tmp_path: Path) -> None:
    with ScriptedUpstream(knows("north")) as upstream:
        upstream.then(*[Step(status=429, headers={"retry-after": "0.02"}), Step(status=503)] * 3)
        async with a_bench(store, tmp_path, model_at(upstream.url)) as bench:
            job = await ended(bench.jobs, await bench.jobs.submit("small", 20, 1.0))
    assert (job.state, job.failed, len(upstream.history)) == ("ready", 0, 26)


async def test_max_usd_is_never_exceeded_and_too_few_labels_are_a_failure(store: Store, tmp_path: Path) -> None:
    with ScriptedUpstream(knows("north")) as upstream:
        async with a_bench(store, tmp_path, model_at(upstream.url)) as bench:
            job = await ended(bench.jobs, await bench.jobs.submit("small", 40, 0.0005))
    assert job.state == "failed"
    assert "max_usd=0.0005" in (job.error or "")
    assert 0 < (job.spent_usd or 0) <= 0.0005
    assert job.done == len(upstream.history)


async def test_max_usd_reached_after_twenty_labels_is_ready(store: Store, tmp_path: Path) -> None:
    with ScriptedUpstream(knows("north")) as upstream:
        async with a_bench(store, tmp_path, model_at(upstream.url)) as bench:
            job = await ended(bench.jobs, await bench.jobs.submit("small", 40, 0.00105))
    assert job.state == "ready"
    assert 20 <= job.done < 40
    assert (job.spent_usd or 0) <= 0.00105


async def test_a_model_without_a_price_is_profiled_only_without_max_usd(store: Store, tmp_path: Path) -> None:
    with ScriptedUpstream(knows("north")) as upstream:
        record = a_record(info={}, api_base=upstream.url)
        async with a_bench(store, tmp_path, record) as bench:
            capped = await ended(bench.jobs, await bench.jobs.submit("small", 20, 1.0))
            assert capped.state == "failed"
            assert "no price" in (capped.error or "")
            assert upstream.history == []
            free = await ended(bench.jobs, await bench.jobs.submit("small", 20, None))
            assert (free.state, free.spent_usd) == ("ready", None)
            await bench.state.refresh()
            assert bench.state.current.model_state("small") == "unpriced"


async def test_fewer_prompts_than_a_profile_usually_needs_must_all_be_labelled(store: Store, tmp_path: Path) -> None:
    with ScriptedUpstream(knows("north")) as upstream:
        async with a_bench(store, tmp_path, model_at(upstream.url)) as bench:
            assert (await ended(bench.jobs, await bench.jobs.submit("small", 8, 1.0))).state == "ready"
            upstream.then(Step(finish_reason="length"))
            short = await ended(bench.jobs, await bench.jobs.submit("small", 8, 1.0))
            assert (short.state, short.unlabelled) == ("failed", 1)
            assert "7 of 8 labels" in (short.error or "")


async def test_answers_truncated_by_our_limit_are_unlabelled_and_by_the_models_own_limit_are_graded(
    store: Store, tmp_path: Path
) -> None:
    with ScriptedUpstream(knows("north")) as upstream:
        upstream.always = Step(finish_reason="length")
        async with a_bench(store, tmp_path, model_at(upstream.url)) as bench:
            cut = await ended(bench.jobs, await bench.jobs.submit("small", 20, 1.0))
            assert (cut.state, cut.unlabelled, cut.failed) == ("failed", 20, 0)
            await bench.registry.update_model(model_at(upstream.url, max_tokens=10))
            graded = await ended(bench.jobs, await bench.jobs.submit("small", 20, 1.0))
            assert (graded.state, graded.unlabelled) == ("ready", 0)
    assert upstream.last.body["max_tokens"] == 10


async def test_a_model_that_reasons_past_its_limit_is_asked_again_with_a_larger_one(
    store: Store, tmp_path: Path
) -> None:
    thought = {"message": {"role": "assistant", "content": "", "reasoning_content": "hm"}, "finish_reason": "length"}
    with ScriptedUpstream(knows("north")) as upstream:
        upstream.then(Step(**thought))  # type: ignore[arg-type]
        async with a_bench(store, tmp_path, model_at(upstream.url), profile={"concurrency": 1}) as bench:
            job = await ended(bench.jobs, await bench.jobs.submit("small", 8, 1.0))
    assert (job.state, job.unlabelled) == ("ready", 0)
    assert [request.body["max_tokens"] for request in upstream.history[:3]] == [50, 50 + 4096, 50]


async def test_a_cancelled_job_stops_asking_and_stores_no_profile(store: Store, tmp_path: Path) -> None:
    with ScriptedUpstream(knows("north"), slow_s=0.1) as upstream:
        async with a_bench(store, tmp_path, model_at(upstream.url), profile={"concurrency": 1}) as bench:
            job = await bench.jobs.submit("small", 40, 1.0)
            await until(lambda: len(upstream.history) >= 2)
            assert await bench.jobs.cancel(job.id)
            await until(lambda: not bench.jobs.worker._working)
            seen = len(upstream.history)
            cancelled = await bench.jobs.get(job.id)
            assert cancelled is not None
            assert cancelled.state == "cancelled"
            assert seen < 10
            assert await store.client.hlen(PROFILES) == 0
            assert not await bench.jobs.cancel(job.id)


async def test_a_model_removed_while_it_is_profiled_leaves_nothing_behind(store: Store, tmp_path: Path) -> None:
    with ScriptedUpstream(knows("north"), slow_s=0.05) as upstream:
        async with a_bench(store, tmp_path, model_at(upstream.url)) as bench:
            job = await bench.jobs.submit("small", 20, 1.0)
            await until(lambda: len(upstream.history) >= 2)
            await bench.registry.remove_model("small")
            over = await ended(bench.jobs, job)
    assert (over.state, over.error) == ("failed", "the model was removed")
    assert await store.client.hlen(PROFILES) == 0


async def test_a_removed_model_has_no_latest_job_and_its_jobs_can_still_be_read(store: Store, tmp_path: Path) -> None:
    with ScriptedUpstream(knows("north")) as upstream:
        async with a_bench(store, tmp_path, model_at(upstream.url)) as bench:
            job = await ended(bench.jobs, await bench.jobs.submit("small", 20, 1.0))
            await bench.registry.remove_model("small")
            assert await store.client.hgetall(LATEST_JOBS) == {}
            assert await bench.jobs.get(job.id) == job


async def test_a_job_submitted_while_its_model_is_removed_is_not_the_latest_of_any(
    store: Store, tmp_path: Path
) -> None:
    with ScriptedUpstream(knows("north"), slow_s=0.05) as upstream:
        async with a_bench(store, tmp_path, model_at(upstream.url)) as bench:
            job = await bench.jobs.submit("small", 20, 1.0)
            await until(lambda: len(upstream.history) >= 2)
            await bench.registry.remove_model("small")
            await store.client.hset(LATEST_JOBS, "small", job.id)
            await ended(bench.jobs, job)
    assert await store.client.hgetall(LATEST_JOBS) == {}


async def test_the_latest_job_of_a_model_is_forgotten_once_it_is_gone(store: Store) -> None:
    await store.client.hset(LATEST_JOBS, mapping={"of the file before": "gone"})
    assert await JobStore(store).latest() == {}
    assert await store.client.hgetall(LATEST_JOBS) == {}


async def test_a_store_that_takes_no_writes_lists_the_latest_jobs(store: Store) -> None:
    await store.client.hset(LATEST_JOBS, mapping={"of the file before": "gone"})
    await store.client.config_set("min-replicas-to-write", 1)
    try:
        assert await JobStore(store).latest() == {}
    finally:
        await store.client.config_set("min-replicas-to-write", 0)
    assert await store.client.hgetall(LATEST_JOBS) == {"of the file before": "gone"}


async def test_a_model_changed_while_it_is_profiled_is_not_ready(store: Store, tmp_path: Path) -> None:
    with ScriptedUpstream(knows("north"), slow_s=0.02) as upstream:
        async with a_bench(store, tmp_path, model_at(upstream.url)) as bench:
            job = await bench.jobs.submit("small", 20, 1.0)
            await until(lambda: len(upstream.history) >= 2)
            await bench.registry.update_model(model_at(upstream.url, temperature=1))
            over = await ended(bench.jobs, job)
    assert over.state == "failed"
    assert "litellm_params were changed" in (over.error or "")
    assert await store.client.hlen(PROFILES) == 0


async def test_a_cancelled_job_has_a_reason_and_leaves_no_task_behind(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ScriptedUpstream(knows("north"), slow_s=0.05) as upstream:
        async with a_bench(store, tmp_path, model_at(upstream.url), profile={"concurrency": 8}) as bench:
            job = await bench.jobs.submit("small", 40, 1.0)
            await until(lambda: len(upstream.history) >= 8)
            await bench.jobs.cancel_for("small", "the model was removed")
            await until(lambda: not bench.jobs.worker._working)
            cancelled = (await bench.jobs.latest())["small"]
            gc.collect()
    assert (cancelled.id, cancelled.state, cancelled.error) == (job.id, "cancelled", "the model was removed")
    assert "never retrieved" not in caplog.text


async def test_foreign_entries_in_the_stream_stop_no_worker(store: Store, tmp_path: Path) -> None:
    with ScriptedUpstream(knows("north")) as upstream:
        async with a_bench(store, tmp_path, model_at(upstream.url)) as bench:
            for entry in ({"word": "foreign"}, {"data": "garbage"}, {"data": "[]"}):
                await store.client.xadd(STREAM, entry)  # type: ignore[arg-type]
            job = await ended(bench.jobs, await bench.jobs.submit("small", 20, 1.0), timeout_s=4.0)
            assert job.state == "ready"


async def test_a_judge_grades_what_no_rule_can_and_is_paid_from_the_same_budget(store: Store, tmp_path: Path) -> None:
    write_validation_set(tmp_path / "prompts.jsonl", 20, grader={"type": "judge", "rubric": "Is it a number?"})
    with ScriptedUpstream(lambda text: '{"score": 0.5}' if "rubric" in text.lower() else "42") as upstream:
        record = model_at(upstream.url)
        async with a_bench(store, tmp_path, record, judge_model="small") as bench:
            job = await ended(bench.jobs, await bench.jobs.submit("small", 20, 1.0))
            await until(lambda: "small" in bench.state.current.profiles)
            profile = bench.state.current.profiles["small"]
    assert job.state == "ready"
    assert len(upstream.history) == 40
    assert profile.error_sums.sum() == pytest.approx(10)


async def test_a_set_that_needs_a_judge_is_refused_without_one(store: Store, tmp_path: Path) -> None:
    write_validation_set(tmp_path / "prompts.jsonl", 20, grader={"type": "judge", "rubric": "Is it a number?"})
    async with a_bench(store, tmp_path, a_record()) as bench:
        job = await ended(bench.jobs, await bench.jobs.submit("small", 20, 1.0))
    assert "set judge_model" in (job.error or "")


async def test_the_answers_of_a_job_are_an_outcomes_file(store: Store, tmp_path: Path) -> None:
    with ScriptedUpstream(knows("north")) as upstream:
        async with a_bench(store, tmp_path, model_at(upstream.url)) as bench:
            job = await ended(bench.jobs, await bench.jobs.submit("small", 20, 1.0))
            lines = await bench.jobs.outcomes(job.id)
    assert len(lines) == 20
    north = next(line for line in lines if line["source"] == "north")
    assert (north["scores"], north["output_tokens"]) == ({"small": 1.0}, {"small": 4})


async def test_a_warning_says_when_all_models_are_wrong_on_nearly_everything(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ScriptedUpstream(knows()) as upstream:
        async with a_bench(store, tmp_path, model_at(upstream.url)) as bench:
            await ended(bench.jobs, await bench.jobs.submit("small", 40, 1.0))
            await until(lambda: "every measured model is wrong" in caplog.text)
            doubted = bench.state.current.measuring_doubt
            await bench.registry.put_profile(bench.record, a_profile())
            await bench.state.refresh()
            believed = bench.state.current.measuring_doubt

    assert doubted is not None
    assert "check the graders" in doubted
    assert believed is None
