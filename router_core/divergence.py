"""How the prompts that come differ from those that a map was fitted to: over its clusters, and far from all of them.

Prompts that come close together are alike: an agent repeats itself, mornings differ from nights. So they are summed in
blocks of time, and the variance of a share is that between the blocks, the ultimate clusters of survey sampling
(Hansen, Hurwitz and Madow, 1953): of as many prompts as the blocks together are worth, and not of all. The test is
Pearson's of two samples with the counts divided by the mean design effect, as Rao and Scott have it (JASA 76, 1981,
first order). With many prompts the least difference is significant: what it amounts to is the distance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from router_core.clustering import NOVEL_SHARE
from router_core.decision import wilson_interval
from router_core.types import Doubles

# With fewer blocks the prompts are taken for independent of each other.
MIN_BLOCKS = 8

# With fewer prompts nothing is said.
MIN_PROMPTS = 1000

# A map of one's own is worth fitting from here on. On public outcome data, traffic at a distance of 0.3 to 0.55 from a
# map was routed as well by it as by one that was fitted to that traffic, within half a point of Area. The share of
# novel prompts is NOVEL_SHARE by construction: five times that is no chance, and of them the profiles say little.
MAX_DISTANCE, MAX_NOVEL_SHARE = 0.5, 5 * NOVEL_SHARE

DRAWS = 1000

TEST = "two-sample chi-square test, counts divided by the design effect (Rao and Scott, 1981)"


@dataclass(frozen=True, eq=False)
class BlockSums:
    """Prompts of B blocks of time. Columns of the arrays: the K clusters, and last the prompts that are novel."""

    blocks: float
    prompts: float
    square_prompts: float
    """Σ_b n_b² of the n_b prompts of each block."""
    sums: Doubles
    """(K + 1,) Σ_b s_b of the weights s_b in each cluster."""
    squares: Doubles
    """(K + 1,) Σ_b s_b²."""
    products: Doubles
    """(K + 1,) Σ_b s_b·n_b."""

    @cached_property
    def shares(self) -> Doubles:
        """(K + 1,)"""
        return self.sums / max(self.prompts, 1e-9)

    @cached_property
    def variances(self) -> Doubles:
        """(K + 1,) of the shares: between blocks, or with few of them as of independent prompts."""
        n, p = max(self.prompts, 1e-9), self.shares
        if self.blocks < MIN_BLOCKS:
            return np.asarray(p * (1.0 - p) / n)
        between = (self.squares - 2.0 * p * self.products + p**2 * self.square_prompts) / n**2
        return np.maximum(between * self.blocks / (self.blocks - 1.0), 0.0)

    @property
    def effective_prompts(self) -> float:
        """Return how many independent prompts these are worth: those that would give the shares the same variance."""
        p, total = self.shares[:-1], float(self.variances[:-1].sum())
        independent = float((p * (1.0 - p)).sum())
        return min(self.prompts, independent / total) if total > 0 else self.prompts

    def intervals(self) -> tuple[Doubles, Doubles]:
        """Return 90 % bounds of the (K + 1,) shares."""
        p, variances = self.shares, self.variances
        worth = np.full_like(p, self.effective_prompts)
        np.divide(p * (1.0 - p), variances, out=worth, where=variances > 0)
        return wilson_interval(p, np.minimum(worth, self.prompts))


@dataclass(frozen=True, slots=True)
class ShareInterval:
    share: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Divergence:
    """Traffic beside a map's own prompts. Bounds hold with 90 % confidence."""

    prompts: float
    effective_prompts: float
    blocks: float
    distance: ShareInterval
    """Total variation: the share of the traffic that would have to be in other clusters to be as the map's prompts."""
    by_chance: float
    """The distance that so many prompts would have if they were as the map's."""
    p: float
    """Of TEST."""

    @property
    def is_far(self) -> bool:
        return self.prompts >= MIN_PROMPTS and self.distance.low >= MAX_DISTANCE


def diverge(traffic: BlockSums, shares: Doubles, fitted_prompts: int | None, *, seed: int = 0) -> Divergence:
    """Compare traffic with the (K,) shares of the prompts that a map was fitted to.

    Args:
        fitted_prompts: how many these were; None: not known, and the shares are taken for exact.
    """
    p, n = traffic.shares[:-1], max(traffic.effective_prompts, 1e-9)
    of_map = 1.0 / fitted_prompts if fitted_prompts else 0.0
    pooled = (n * of_map * p + shares) / (n * of_map + 1.0)
    doubt = pooled * (1.0 / n + of_map)
    statistic = float(np.divide((p - shares) ** 2, doubt, out=np.zeros_like(p), where=doubt > 0).sum())
    distance = 0.5 * float(np.abs(p - shares).sum())
    deviations = np.sqrt(traffic.variances[:-1] + shares * (1.0 - shares) * of_map)
    drawn = p - shares + np.random.default_rng(seed).normal(size=(DRAWS, len(p))) * deviations
    near, far = np.quantile(0.5 * np.abs(drawn).sum(axis=1), (0.05, 0.95)).tolist()
    return Divergence(
        prompts=traffic.prompts,
        effective_prompts=n,
        blocks=traffic.blocks,
        # The basic bootstrap (Davison and Hinkley, 1997, section 5.2): a distance is too large on average.
        distance=ShareInterval(distance, max(0.0, 2 * distance - far), min(1.0, max(0.0, 2 * distance - near))),
        by_chance=0.5 * float(np.sqrt(2.0 * doubt * (1.0 - pooled) / math.pi).sum()),
        p=chi_square_p(statistic, len(p) - 1),
    )


def chi_square_p(statistic: float, freedom: int) -> float:
    """Return the p-value of a chi-square statistic, by the cube root of Wilson and Hilferty (PNAS 17, 1931)."""
    if freedom < 1:
        return 1.0
    spread = 2.0 / (9.0 * freedom)
    z = ((max(statistic, 0.0) / freedom) ** (1.0 / 3.0) - (1.0 - spread)) / math.sqrt(spread)
    return 0.5 * math.erfc(z / math.sqrt(2.0))
