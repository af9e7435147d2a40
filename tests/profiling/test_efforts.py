"""The efforts of a model are measured by one job, each on prompts of its own, and each gets a profile."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from proxy.profiling.jobs import profile_new_models
from proxy.profiling.runner import deal, is_asked, turns_of
from proxy.settings.model_config import ModelConfig
from proxy.storage.profile_history import read_history
from proxy.storage.records import ModelRecord
from proxy.storage.redis import Store
from router_core.validation.families.registry import builtin_validation_set
from tests.support.makers import PRICED, a_record
from tests.support.profiling import a_bench, ended, settings_for
from tests.support.scripted_answers import Json
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.two_maps import HALVES
from tests.support.waiting import until

PROMPTS = builtin_validation_set().prompts[:4]
EFFORTS = ("low", "medium", "high")
NAMES = tuple(f"small@{effort}" for effort in EFFORTS)


def thinker(url: str, efforts: Any = EFFORTS, **more: Any) -> ModelRecord:
    return a_record(api_base=url, info={**PRICED, "effort": efforts}, **more)


def thinks(body: Json) -> str:
    """Answer the north at every effort, and the rest at high alone."""
    text = str(body["messages"][-1]["content"])
    right = text.startswith("north") or body["reasoning_effort"] == "high"
    return f"The number is {text.rsplit(' ', 1)[-1] if right else -1}" + " hm" * EFFORTS.index(body["reasoning_effort"])


def thinking_upstream(slow_s: float = 0.0) -> ScriptedUpstream:
    upstream = ScriptedUpstream(slow_s=slow_s)
    upstream.skill_of_body = thinks
    return upstream


def asked(upstream: ScriptedUpstream) -> Counter[tuple[str, str]]:
    return Counter((each.body["reasoning_effort"], each.body["messages"][-1]["content"]) for each in upstream.history)


def test_neighbouring_efforts_share_half_of_their_prompts() -> None:
    dealt = deal(PROMPTS, {"a": "@a", "b": "@b", "c": "@c"})
    asked_of = {model: [PROMPTS.index(each.prompt) for each in dealt if each.model == model] for model in "abc"}
    assert asked_of == {"a": [0, 1], "b": [1, 2], "c": [2, 3]}
    assert dealt[0].id == f"{PROMPTS[0].id}@a"


@pytest.mark.parametrize("families", [1, 2, 3, 4, 8])
def test_each_effort_is_asked_about_as_many_prompts_of_each_family(families: int) -> None:
    turns = turns_of(str(place % families) for place in range(48))
    asked_of = Counter(
        (effort, place % families) for effort in range(3) for place in range(48) if is_asked(effort, turns[place], 3)
    )
    assert len(asked_of) == 3 * families
    assert all(abs(count - 24 / families) <= 1 for count in asked_of.values())


def test_questions_that_are_answered_stay_among_those_of_a_job() -> None:
    answered = f"{PROMPTS[3].id}@a"
    dealt = [each.id for each in deal(PROMPTS, {"a": "@a", "b": "@b"}, {answered})]
    assert dealt == [answered, *(f"{PROMPTS[place].id}@{model}" for place, model in ((0, "a"), (1, "a"), (1, "b")))]


async def test_one_job_makes_a_profile_of_each_effort(store: Store, tmp_path: Path) -> None:
    with thinking_upstream() as upstream:
        async with a_bench(store, tmp_path, thinker(upstream.url)) as bench:
            job = await ended(bench.jobs, await bench.jobs.submit("small", 24, 1.0))
            await until(lambda: bench.state.current.model_state("small") == "ready")
            profiles = bench.state.current.profiles
            spent = [(await read_history(store, name))[0].spent_usd or 0.0 for name in NAMES]
            lines = await bench.jobs.outcomes(job.id)
            pool = bench.state.current.pool
            easy, *hard = pool.errors[pool.index["small@low"]]
    assert easy < 0.35 < 0.6 < min(hard)
    assert (job.state, job.done, job.total, job.error) == ("ready", 36, 36, None)
    assert Counter(effort for effort, _ in asked(upstream).elements()) == dict.fromkeys(EFFORTS, 12)
    assert len({text for _, text in asked(upstream)}) == 24
    assert profiles.keys() == set(NAMES)
    assert profiles["small@low"].mean_error > 0.5 > 0.1 > profiles["small@high"].mean_error
    lengths = [profiles[name].mean_output_tokens or 0.0 for name in NAMES]
    assert lengths == sorted(lengths)
    assert sum(spent) == pytest.approx(job.spent_usd)
    assert Counter(name for line in lines for name in line["scores"]) == dict.fromkeys(NAMES, 12)


async def test_an_effort_that_the_provider_refuses_leaves_the_others_measured(store: Store, tmp_path: Path) -> None:
    with thinking_upstream() as upstream:
        upstream.refuses = lambda body: body["reasoning_effort"] == "medium"
        async with a_bench(store, tmp_path, thinker(upstream.url)) as bench:
            job = await ended(bench.jobs, await bench.jobs.submit("small", 40, 1.0))
            await until(lambda: "small@high" in bench.state.current.profiles)
            measured = set(bench.state.current.profiles)
            entry = ModelConfig(model_name="small", litellm_params={"model": "openai/small"})
            settings = settings_for(tmp_path, model_list=[entry])
            await profile_new_models(settings, bench.state, bench.jobs)  # as another start would
            assert await bench.jobs.for_model("small") == await bench.jobs.get(job.id)
    assert (job.state, measured) == ("ready", {"small@low", "small@high"})
    assert "small@medium: 5 prompts in a row failed: small@medium answered with status 400" in (job.error or "")


async def test_a_job_that_was_interrupted_asks_nothing_twice(store: Store, tmp_path: Path) -> None:
    with thinking_upstream(slow_s=0.02) as upstream:
        async with a_bench(store, tmp_path, thinker(upstream.url)) as one:
            job = await one.jobs.submit("small", 24, 1.0)
            await until(lambda: len(upstream.history) >= 10)
            await one.jobs.worker.stop()
        async with a_bench(store, tmp_path, thinker(upstream.url, source="config")) as two:
            assert (await ended(two.jobs, job)).state == "ready"
    again = [question for question, times in asked(upstream).items() if times > 1]
    assert len(asked(upstream)) == 36
    assert len(again) <= 8  # those that were under way


async def test_answers_on_another_map_make_the_profiles_of_all_efforts_on_this_one(
    store: Store, tmp_path: Path
) -> None:
    with thinking_upstream() as upstream:
        async with a_bench(store, tmp_path, thinker(upstream.url)) as bench:
            await ended(bench.jobs, await bench.jobs.submit("small", 40, 1.0))
        seen = len(upstream.history)
        async with a_bench(store, tmp_path, thinker(upstream.url, source="config"), cluster_map=HALVES) as bench:
            await until(lambda: bench.state.current.profiles.keys() == set(NAMES))
            job = await bench.jobs.for_model("small@low")
    assert job is not None
    assert (len(upstream.history), job.carried_over, job.total) == (seen, True, 60)


async def test_configured_efforts_without_a_profile_are_measured_at_the_start_once(
    store: Store, tmp_path: Path
) -> None:
    with thinking_upstream() as upstream:
        record = thinker(upstream.url, source="config")
        entry = ModelConfig(model_name="small", litellm_params=dict(record.litellm_params), model_info=record.info)
        settings = settings_for(tmp_path, model_list=[entry], profile={"prompts": 24})
        async with a_bench(store, tmp_path, record) as bench:
            await profile_new_models(settings, bench.state, bench.jobs)
            job = await bench.jobs.for_model("small")
            assert job is not None
            await ended(bench.jobs, job)
            await until(lambda: bench.state.current.profiles.keys() == set(NAMES))
            await profile_new_models(settings, bench.state, bench.jobs)
            assert await bench.jobs.for_model("small@high") == await bench.jobs.get(job.id)
    assert len(upstream.history) == 36


async def test_an_effort_that_is_added_leaves_the_profiles_of_the_others(store: Store, tmp_path: Path) -> None:
    with thinking_upstream() as upstream:
        async with a_bench(store, tmp_path, thinker(upstream.url, ["low", "high"])) as bench:
            await ended(bench.jobs, await bench.jobs.submit("small", 24, 1.0))
            await bench.registry.update_model(thinker(upstream.url))
            await bench.state.refresh()
            assert bench.state.current.profiles.keys() == {"small@low", "small@high"}
            assert bench.state.current.model_state("small@medium") == "unprofiled"
            await ended(bench.jobs, await bench.jobs.submit("small@medium", 24, 1.0))
            await until(lambda: bench.state.current.profiles.keys() == set(NAMES))


async def test_efforts_that_were_changed_while_they_are_measured_fail_the_job(store: Store, tmp_path: Path) -> None:
    with thinking_upstream(slow_s=0.05) as upstream:
        async with a_bench(store, tmp_path, thinker(upstream.url)) as bench:
            job = await bench.jobs.submit("small", 24, 1.0)
            await until(lambda: bool(upstream.history))
            await bench.registry.update_model(thinker(upstream.url, temperature=1))
            over = await ended(bench.jobs, job)
    assert (over.state, over.error) == (
        "failed",
        "litellm_params were changed while the model was being measured; profile it again",
    )
