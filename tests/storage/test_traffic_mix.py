from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from proxy.storage.redis import Store, StoreUnavailable
from proxy.storage.traffic_mix import BATCH_SIZE, TRAFFIC, TrafficMix, parse_traffic
from router_core.clustering import FittedPrompts
from router_core.types import Assignment
from tests.support.makers import CORNERS

MAP = CORNERS.with_known(fitted_prompts=FittedPrompts(100, np.full(4, 0.25), 0.5))
NOON = 1_800_000_000 // 86_400 * 86_400 + 12 * 3600
HOUR_S, DAY_S = 3600, 86_400


class Clock:
    def __init__(self) -> None:
        self.now = float(NOON)

    def __call__(self) -> float:
        return self.now


def prompt(*clusters: int, weights: Sequence[float] = (0.75, 0.25), cosine: float = 0.9) -> Assignment:
    ids = np.array([clusters], dtype=np.int64)
    return Assignment(
        ids, np.array([weights], dtype=np.float32)[:, : len(clusters)], np.array([cosine], dtype=np.float32)
    )


async def test_prompts_of_all_processes_are_summed_by_cluster(store: Store, second_store: Store) -> None:
    clock = Clock()
    one, other = TrafficMix(store, MAP, clock=clock), TrafficMix(second_store, MAP, clock=clock)
    for mix, times in ((one, 3), (other, 1)):
        for _ in range(times):
            mix.observe(prompt(0, 2))
        await mix.flush()
    found = await one.read(1)

    assert found is not None
    assert (found.prompts, found.blocks) == (4, 2)
    assert found.shares.tolist() == [0.75, 0, 0.25, 0, 0]


async def test_the_sums_by_block_are_those_of_the_blocks_however_often_they_were_sent(store: Store) -> None:
    clock, rng, blocks = Clock(), np.random.default_rng(0), []
    mix = TrafficMix(store, MAP, clock=clock)
    for _ in range(9):
        counts = rng.integers(0, 6, size=4)
        for cluster, count in enumerate(counts.tolist()):
            for _ in range(count):
                mix.observe(prompt(cluster, weights=(1.0,)))
            await mix.flush()
        blocks.append(counts)
        clock.now += HOUR_S
        await mix.flush()
    found = await mix.read(2)
    whole = np.array(blocks, dtype=float)
    sizes = whole.sum(axis=1)

    assert found is not None
    assert (found.blocks, found.prompts, found.square_prompts) == (9, sizes.sum(), (sizes**2).sum())
    assert found.sums[:-1] == pytest.approx(whole.sum(axis=0))
    assert found.squares[:-1] == pytest.approx((whole**2).sum(axis=0))
    assert found.products[:-1] == pytest.approx((whole * sizes[:, None]).sum(axis=0))


async def test_prompts_far_from_every_cluster_are_counted_as_novel(store: Store) -> None:
    told: list[int] = []
    mix = TrafficMix(store, MAP, told.append, Clock())
    for cosine in (0.49, 0.51, 0.2, 0.9):
        mix.observe(prompt(1, weights=(1.0,), cosine=cosine))
    await mix.flush()
    found = await mix.read(1)

    assert found is not None
    assert (found.sums[-1], told) == (2, [2])


async def test_a_map_that_knows_no_bound_has_no_novel_prompts(store: Store) -> None:
    mix = TrafficMix(store, CORNERS, clock=Clock())
    mix.observe(prompt(1, weights=(1.0,), cosine=-1.0))
    await mix.flush()
    found = await mix.read(1)

    assert found is not None
    assert found.sums[-1] == 0


async def test_days_are_read_apart_and_expire(store: Store) -> None:
    clock = Clock()
    mix = TrafficMix(store, MAP, clock=clock)
    for _ in range(3):
        mix.observe(prompt(0, weights=(1.0,)))
        await mix.flush()
        clock.now += DAY_S
        await mix.flush()
    clock.now -= DAY_S
    read = [await mix.read(days) for days in (1, 2, 3)]
    keys = await store.client.keys(f"{TRAFFIC}:*")
    times_to_live = [await store.client.ttl(key) for key in keys]

    assert [each.prompts for each in read if each] == [1, 2, 3]
    assert len(keys) == 3
    assert min(times_to_live) > 31 * DAY_S


async def test_traffic_of_another_map_is_not_read(store: Store) -> None:
    mix = TrafficMix(store, MAP, clock=Clock())
    mix.observe(prompt(0))
    await mix.flush()
    assert await TrafficMix(store, MAP.with_hard_assignment(), clock=Clock()).read(7) is None


async def test_what_the_store_did_not_take_is_sent_with_what_comes_next(store: Store) -> None:
    mix = TrafficMix(store, MAP, clock=Clock())
    mix.observe(prompt(0, weights=(1.0,)))
    await store.client.config_set("maxmemory", "1")
    try:
        with pytest.raises(StoreUnavailable):
            await mix.flush()
    finally:
        await store.client.config_set("maxmemory", "0")
    mix.observe(prompt(0, weights=(1.0,)))
    await mix.flush()
    found = await mix.read(1)

    assert found is not None
    assert (found.prompts, found.sums[0], found.blocks, found.square_prompts) == (2, 2, 1, 4)


async def test_many_prompts_are_added_up_before_they_are_sent(store: Store) -> None:
    told: list[int] = []
    mix = TrafficMix(store, MAP, told.append, Clock())
    for _ in range(BATCH_SIZE):
        mix.observe(prompt(0, cosine=0.1))
    assert told == [BATCH_SIZE]


def test_fields_that_are_none_of_ours_are_left_out() -> None:
    stored = {"n": "2", "nn": "4", "blocks": "1", "s:0": "2", "q:0": "x", "s:9": "1", "z:1": "1", "s:novel": "1"}
    found = parse_traffic([stored, {"n": "1"}], 4)

    assert found is not None
    assert (found.prompts, found.sums.tolist(), found.squares.tolist()) == (3, [2, 0, 0, 0, 1], [0] * 5)
    assert parse_traffic([{"n": "nan"}], 4) is None
    assert parse_traffic([], 4) is None
