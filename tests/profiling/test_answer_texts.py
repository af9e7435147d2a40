"""The texts of validation answers, which are kept beside their grades."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.profiling.job_store import KEPT_S, MAX_TEXT_CHARS, AnswerText, JobStore, answers_key, texts_key
from proxy.storage.redis import Store
from router_core.errors import InvalidInput
from tests.support.makers import a_record
from tests.support.profiling import a_bench, ended, knows, model_at
from tests.support.scripted_answers import Step
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.two_maps import HALVES, latest_job, measured_on_corners, profile_in_use

IDS = [f"p{number}" for number in range(40)]


async def test_each_answer_is_kept_with_its_grade_for_as_long_as_that(store: Store, tmp_path: Path) -> None:
    with ScriptedUpstream(knows("north", "east")) as upstream:
        async with a_bench(store, tmp_path, model_at(upstream.url)) as bench:
            job = await ended(bench.jobs, await bench.jobs.submit("small", 24, 1.0))
            kept = await bench.jobs.latest_answers(["small", "nobody"], IDS)
            assert await bench.jobs.latest_answers([], IDS) == await bench.jobs.latest_answers(["small"], []) == {}
    answers = kept["small"]

    assert (len(answers), list(kept)) == (24, ["small"])
    for prompt, answer in answers.items():
        right = int(prompt[1:]) % 4 < 2
        assert answer.text is not None
        assert answer.text.beginning == f"The number is {prompt[1:] if right else -1}"
        assert (answer.score, answer.text.is_whole) == (float(right), True)
        assert answer.cost_usd is not None
    lives = [await store.client.ttl(key) for key in (answers_key(job.id), texts_key(job.id))]
    assert all(KEPT_S - 60 < seconds <= KEPT_S for seconds in lives)


async def test_a_long_answer_is_kept_in_part_and_one_that_failed_has_none(store: Store, tmp_path: Path) -> None:
    with ScriptedUpstream(lambda _: "x" * (MAX_TEXT_CHARS + 5)) as upstream:
        upstream.then(Step(status=404))
        async with a_bench(store, tmp_path, model_at(upstream.url)) as bench:
            await ended(bench.jobs, await bench.jobs.submit("small", 24, None))
            answers = (await bench.jobs.latest_answers(["small"], IDS))["small"].values()
    failed = [answer for answer in answers if answer.failed]
    texts = [answer.text for answer in answers if answer.text is not None]

    assert [answer.text for answer in failed] == [None]
    assert {(len(text.beginning), text.chars, text.is_whole) for text in texts} == {
        (MAX_TEXT_CHARS, MAX_TEXT_CHARS + 5, False)
    }


async def test_none_is_kept_if_the_setting_says_so(store: Store, tmp_path: Path) -> None:
    with ScriptedUpstream(knows("north")) as upstream:
        async with a_bench(store, tmp_path, model_at(upstream.url), profile={"keep_answers": False}) as bench:
            job = await ended(bench.jobs, await bench.jobs.submit("small", 20, 1.0))
            answers = (await bench.jobs.latest_answers(["small"], IDS))["small"]
    assert (job.state, len(answers)) == ("ready", 20)
    assert {answer.text for answer in answers.values()} == {None}
    assert not await store.client.exists(texts_key(job.id))


@pytest.mark.parametrize("keep", [True, False])
async def test_they_are_carried_over_to_another_map_unless_none_are_to_be_kept(
    store: Store, tmp_path: Path, keep: bool
) -> None:
    with ScriptedUpstream(knows("north", "east")) as upstream:
        record = model_at(upstream.url)
        await measured_on_corners(store, tmp_path, record)
        async with a_bench(store, tmp_path, record, cluster_map=HALVES, profile={"keep_answers": keep}) as bench:
            await profile_in_use(bench)
            job = await latest_job(bench)
    assert len(upstream.history) == 24
    assert await store.client.hlen(texts_key(job.id)) == (24 if keep else 0)


async def test_answers_of_before_have_no_text_and_odd_ones_are_left_out(store: Store, tmp_path: Path) -> None:
    with ScriptedUpstream(knows("north")) as upstream:
        async with a_bench(store, tmp_path, model_at(upstream.url)) as bench:
            job = await ended(bench.jobs, await bench.jobs.submit("small", 40, 1.0))
            await store.client.hdel(texts_key(job.id), "p0")
            await store.client.hset(texts_key(job.id), "p1", '{"text": 5}')
            await store.client.hset(answers_key(job.id), "p2", "[]")
            found = (await bench.jobs.latest_answers(["small"], IDS))["small"]
            assert (found["p0"].text, found["p1"].text, found["p0"].score) == (None, None, 1.0)
            assert "p2" not in found
            await store.client.delete(texts_key(job.id))
            await store.client.set(texts_key(job.id), "no hash")
            found = (await bench.jobs.latest_answers(["small"], IDS))["small"]
            assert {answer.text for answer in found.values()} == {None}
    assert len(found) == 39


async def test_they_stay_out_of_the_outcomes_and_of_the_grades(store: Store, tmp_path: Path) -> None:
    with ScriptedUpstream(knows("north")) as upstream:
        async with a_bench(store, tmp_path, model_at(upstream.url)) as bench:
            job = await ended(bench.jobs, await bench.jobs.submit("small", 20, 1.0))
            lines = await bench.jobs.outcomes(job.id)
    assert {tuple(line) for line in lines} == {("id", "source", "prompt", "scores", "output_tokens")}
    assert "The number is" not in str(lines)
    assert "The number is" not in str(await store.client.hvals(answers_key(job.id)))


async def test_a_job_that_is_cancelled_keeps_them_as_long_as_its_grades(store: Store, tmp_path: Path) -> None:
    async with a_bench(store, tmp_path, a_record(), worker=False) as bench:
        job = await bench.jobs.submit("small", 20, 1.0)
        for key in (answers_key(job.id), texts_key(job.id)):
            await store.client.hset(key, "p0", "{}")
        await bench.registry.update_model(a_record(temperature=1))
        await bench.jobs.submit("small", 20, 1.0)
        other = await bench.jobs.submit("small", 20, 1.0)
        await store.client.hset(texts_key(other.id), "p0", "{}")
        await JobStore(store).cancel(other.id)
    for each in (job, other):
        assert 0 < await store.client.ttl(texts_key(each.id)) <= KEPT_S


def test_what_is_no_text_is_refused_and_a_longer_one_is_cut_when_it_is_read() -> None:
    for odd in ("", "[]", "{}", '{"text": "a"}', '{"text": "a", "chars": -1}', '{"text": null, "chars": 1}'):
        with pytest.raises(InvalidInput):
            AnswerText.from_json(odd)
    long = AnswerText.from_json(AnswerText("x" * 9000, 9000).to_json())
    assert (len(long.beginning), long.is_whole) == (MAX_TEXT_CHARS, False)
