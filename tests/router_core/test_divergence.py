from __future__ import annotations

import numpy as np
import pytest

from router_core.artifact import builtin_map
from router_core.divergence import MIN_BLOCKS, BlockSums, chi_square_p, diverge
from router_core.types import Doubles

SHARES = np.array([0.4, 0.3, 0.2, 0.1])


def blocks_of(counts: Doubles, novel: Doubles | None = None) -> BlockSums:
    """Sum up (B, K) prompts of B blocks, of which (B,) are novel."""
    last = np.zeros(len(counts)) if novel is None else novel
    columns, sizes = np.column_stack((counts, last)).astype(float), counts.sum(axis=1).astype(float)
    return BlockSums(
        blocks=len(counts),
        prompts=float(sizes.sum()),
        square_prompts=float((sizes**2).sum()),
        sums=columns.sum(axis=0),
        squares=(columns**2).sum(axis=0),
        products=(columns * sizes[:, None]).sum(axis=0),
    )


def drawn(shares: Doubles, blocks: int, prompts: int, *, seed: int, repeats: int = 1) -> BlockSums:
    """Draw prompts, each of which comes `repeats` times within its block."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(prompts // repeats, shares, size=blocks)
    return blocks_of(np.asarray(repeats * counts, dtype=np.float64))


def test_traffic_as_the_map_is_no_farther_from_it_than_chance_explains() -> None:
    found = [diverge(drawn(SHARES, 48, 100, seed=seed), SHARES, None) for seed in range(100)]

    by_chance = np.mean([each.by_chance for each in found])
    assert np.mean([each.distance.share for each in found]) == pytest.approx(by_chance, rel=0.15)
    assert np.mean([each.p < 0.05 for each in found]) < 0.12
    assert not any(each.is_far for each in found)


def test_prompts_that_repeat_each_other_count_as_fewer() -> None:
    alone, repeated = (diverge(drawn(SHARES, 100, 100, seed=1, repeats=each), SHARES, None) for each in (1, 20))

    assert alone.effective_prompts > 0.7 * alone.prompts
    assert repeated.effective_prompts == pytest.approx(repeated.prompts / 20, rel=0.3)
    assert repeated.by_chance > 3 * alone.by_chance


def test_repeated_prompts_cause_no_false_alarm_that_independent_ones_would() -> None:
    found = [diverge(drawn(SHARES, 60, 200, seed=seed, repeats=20), SHARES, None) for seed in range(100)]
    naive = [chi_square_p(each.prompts * each.distance.share**2 / 0.05, 3) for each in found]

    assert np.mean([each.p < 0.01 for each in found]) < 0.05
    assert np.mean([p < 0.01 for p in naive]) > 0.5


def test_the_bounds_hold_the_true_distance() -> None:
    other = np.array([0.1, 0.2, 0.3, 0.4])
    found = [diverge(drawn(other, 50, 40, seed=seed), SHARES, 5000) for seed in range(100)]
    held = np.mean([each.distance.low <= 0.4 <= each.distance.high for each in found])

    assert 0.8 < held <= 1
    assert all(each.p < 1e-6 for each in found)


def test_with_few_blocks_prompts_are_taken_for_independent() -> None:
    few = drawn(SHARES, MIN_BLOCKS - 1, 100, seed=0, repeats=20)

    assert few.effective_prompts == pytest.approx(few.prompts)
    assert few.variances[:-1] == pytest.approx(few.shares[:-1] * (1 - few.shares[:-1]) / few.prompts)


def test_traffic_in_one_cluster_alone_is_far_and_its_bounds_are_finite() -> None:
    counts = np.zeros((24, 64))
    counts[:, 5] = 100
    found = diverge(blocks_of(counts), np.full(64, 1 / 64), 10_000)

    assert found.is_far
    assert found.distance.share == pytest.approx(63 / 64)
    assert 0.9 < found.distance.low <= found.distance.high <= 1


def test_the_share_of_novel_prompts_has_bounds() -> None:
    sums = blocks_of(np.full((20, 4), 25.0), novel=np.tile([10.0, 0.0], 10))
    low, high = sums.intervals()

    assert sums.shares[-1] == pytest.approx(0.05)
    assert low[-1] < 0.05 < high[-1]
    assert high[-1] - low[-1] > 0.03  # the blocks differ: a binomial of 2,000 prompts would have 0.016


@pytest.mark.parametrize(("statistic", "freedom", "p"), [(7.815, 3, 0.05), (82.53, 63, 0.05), (103.4, 63, 0.001)])
def test_the_p_value_is_that_of_the_chi_square_distribution(statistic: float, freedom: int, p: float) -> None:
    assert chi_square_p(statistic, freedom) == pytest.approx(p, rel=0.06)


def test_the_builtin_map_has_the_shares_of_its_own_prompts() -> None:
    shares = builtin_map().prompt_shares
    assert shares is not None
    assert shares.sum() == pytest.approx(1)
    assert shares.min() > 0.001
