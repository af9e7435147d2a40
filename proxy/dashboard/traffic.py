"""How this deployment's traffic differs from the prompts that the map was fitted to, and when to fit another map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proxy.dashboard.pictures import Mark, Tick
from proxy.server.dependencies import AppState
from proxy.storage.redis import StoreUnavailable
from router_core.clustering import ClusterMap
from router_core.divergence import (
    MAX_DISTANCE,
    MAX_NOVEL_SHARE,
    MIN_BLOCKS,
    MIN_PROMPTS,
    BlockSums,
    Divergence,
    diverge,
)
from router_core.divergence import TEST as DIVERGENCE_TEST

# Of traffic that counts.
DAYS = 7

# Clusters that are drawn and listed, those first whose shares differ most.
MAX_CLUSTERS = 128

# How the prompts of this deployment become a map. Decisions have them if `log_prompts` is set.
FIT_COMMANDS = """uniroute decisions export --prompts --out traffic.jsonl
uniroute fit traffic.jsonl --out mymap
UNIROUTE_MAP=mymap uniroute serve"""


@dataclass(frozen=True, slots=True)
class ClusterShare:
    """The share of the traffic in one cluster, with its 90 % bounds, and of the map's own prompts (None: unknown)."""

    cluster: int
    name: str
    share: float
    low: float
    high: float
    of_map: float | None

    @property
    def text(self) -> str:
        own = "" if self.of_map is None else f", {self.of_map:.1%} of the map's prompts"
        return f"“{self.name}”: {self.share:.1%} ({self.low:.1%} to {self.high:.1%}) of the traffic{own}"


@dataclass(frozen=True)
class TrafficView:
    prompts: float
    effective_prompts: float
    blocks_suffice: bool
    """There are enough blocks of time to tell how much prompts depend on each other."""
    clusters: Sequence[ClusterShare]
    """Those whose shares differ most come first."""
    left_out: int
    novel: ClusterShare | None
    """The share of novel prompts; None: the map does not know what is novel to it."""
    divergence: Divergence | None
    """None: the map does not know its own prompts."""
    test: str = DIVERGENCE_TEST

    @property
    def is_enough(self) -> bool:
        return self.prompts >= MIN_PROMPTS

    @property
    def needs_map(self) -> bool:
        """Return whether a map of one's own is worth fitting, by the lower bounds of both figures."""
        if not self.is_enough:
            return False
        is_novel = self.novel is not None and self.novel.low >= MAX_NOVEL_SHARE
        return is_novel or (self.divergence is not None and self.divergence.is_far)

    @property
    def advice(self) -> str:
        """Say whether to fit a map, and by which bounds."""
        bounds = (
            f"a map of your own is worth fitting once, beyond chance, {MAX_DISTANCE:.0%} of the traffic would have to"
            f" be in other clusters to be as the map's prompts, or {MAX_NOVEL_SHARE:.0%} of the prompts are novel"
        )
        if not self.is_enough:
            return f"Too little is known yet: {bounds}; that is said of {MIN_PROMPTS:,} prompts or more."
        if not self.needs_map:
            return f"The map is good for this traffic: {bounds}."
        reasons = []
        if self.divergence is not None and self.divergence.is_far:
            reasons.append(
                f"{self.divergence.distance.share:.0%} of the traffic would have to be in other clusters to be as the"
                " prompts that the map was fitted to, so that few of its clusters tell your prompts apart"
            )
        if self.novel is not None and self.novel.low >= MAX_NOVEL_SHARE:
            reasons.append(
                f"{self.novel.share:.1%} of the prompts are far from all of its clusters, and of them the profiles say"
                " little"
            )
        return f"Fit a map of your own: {'; and '.join(reasons)}."


async def traffic_view(state: AppState, days: int = DAYS) -> TrafficView | None:
    """Compare the last days' traffic with the map's prompts; None: nothing was routed, or the store is away."""
    try:
        sums = await state.traffic_mix.read(days)
    except StoreUnavailable:
        return None
    return None if sums is None else compare(sums, state.snapshots.current.cluster_map)


def compare(sums: BlockSums, cluster_map: ClusterMap) -> TrafficView:
    shares, (low, high) = sums.shares, sums.intervals()
    own, fitted = cluster_map.prompt_shares, cluster_map.fitted_prompts
    rows = [
        ClusterShare(
            cluster=k,
            name=cluster_map.names[k],
            share=float(shares[k]),
            low=float(low[k]),
            high=float(high[k]),
            of_map=None if own is None else float(own[k]),
        )
        for k in range(cluster_map.size)
    ]
    rows.sort(key=lambda row: (-abs(row.share - (row.of_map or 0.0)), row.cluster))
    novel = None
    if fitted is not None:
        novel = ClusterShare(-1, "novel", float(shares[-1]), float(low[-1]), float(high[-1]), None)
    return TrafficView(
        prompts=sums.prompts,
        effective_prompts=sums.effective_prompts,
        blocks_suffice=sums.blocks >= MIN_BLOCKS,
        clusters=rows[:MAX_CLUSTERS],
        left_out=max(0, len(rows) - MAX_CLUSTERS),
        novel=novel,
        divergence=None if own is None else diverge(sums, own, fitted.count if fitted else None),
    )


@dataclass(frozen=True)
class ShareChart:
    """Shares of the traffic as bars, those of the map as lines across them."""

    bars: Sequence[Mark]
    lines: Sequence[Mark]
    y_ticks: Sequence[Tick]
    width: float
    height: int = 190
    left: int = 40
    top: int = 8
    floor: int = 182


STEP = 13.0


def share_chart(rows: Sequence[ClusterShare]) -> ShareChart:
    """Draw the clusters from left to right, the largest share of the traffic first."""
    ordered = sorted(rows, key=lambda row: (-row.share, row.cluster))
    chart = ShareChart((), (), (), width=40 + STEP * len(ordered))
    most = max([max(row.share, row.of_map or 0.0) for row in ordered], default=0.0) or 1.0
    scale = (chart.floor - chart.top) / most
    bars, lines = [], []
    for place, row in enumerate(ordered):
        x = round(chart.left + STEP * place + 1, 1)
        height = round(max(scale * row.share, 0.5), 1)
        bars.append(Mark(x, round(chart.floor - height, 1), row.text, width=STEP - 3, height=height))
        if row.of_map is not None:
            lines.append(Mark(x - 1, round(chart.floor - scale * row.of_map, 1), "", width=STEP - 1))
    ticks = [Tick(round(chart.floor - scale * most * part, 1), f"{most * part:.1%}") for part in (0.0, 0.5, 1.0)]
    return ShareChart(bars, lines, ticks, width=chart.width)
