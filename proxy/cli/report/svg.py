from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from proxy.cli.report.text import ESTIMATING, LOOKS, OURS, area_is_known, best_rivals, median_labels
from router_core.evaluation.study import Results
from router_core.types import Doubles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# From back to front.
CURVES = ("random_mix", "learned_map", "knn", "kmeans_raw", OURS)

INK, FAINT, GRID = "#1f2328", "#59636e", "#d9dee3"

# Text stays text, which is small. It is laid out for DejaVu Sans: Verdana is as wide, all other fonts narrower.
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "uniroute",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "figure.constrained_layout.h_pad": 0.12,
    "figure.constrained_layout.w_pad": 0.12,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
}

# One in so many points of a curve is drawn: an eye sees no more, and the file stays small.
EVERY = 4


def write_svg(results: Results, path: Path, labels: int | None = None) -> None:
    """`labels`: the N of the curves; the middle one unless said. White lies behind all, as pages may be dark."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        panels = 2 if len(results.protocol.labels) > 1 and area_is_known(results) else 1
        figure = Figure(figsize=(5.6 * panels, 4.6), facecolor="white", layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        _draw_curves(axes[0], results, labels or median_labels(results))
        if panels > 1:
            _draw_areas(axes[1], results)
        _legend(figure, axes)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _draw_curves(axes: Axes, results: Results, labels: int) -> None:
    if not area_is_known(results):
        _say_undefined(axes)
        return
    for method in CURVES:
        if method in results.methods:
            _draw_curve(axes, results, method, labels)
    single = results.methods["best_single"][labels].curve
    look = LOOKS["best_single"]
    axes.plot(single.costs[:1], 100 * single.qualities[:1], "D", color=INK, markersize=6, label=look.label, zorder=4)
    title = f"Deferral curves, {labels} labels{_draw_oracle(axes, results, labels)}"
    axes.set(title=title, xlabel="mean cost ÷ the best single model's", ylabel="mean quality ×100")


def _draw_curve(axes: Axes, results: Results, method: str, labels: int) -> None:
    curve, look = results.methods[method][labels].curve, LOOKS[method]
    costs, qualities = _thinned(curve.costs), 100 * _thinned(curve.qualities)
    axes.plot(costs, qualities, **_line(method), label=look.label)


def _line(method: str) -> dict[str, Any]:
    """Ours before all others, the learned map thin: it is the one that needs known models to be trained on."""
    look = LOOKS[method]
    width = {OURS: 2.8, "learned_map": 1.0}.get(method, 1.6)
    style = (0.0, look.dashes) if look.dashes else "solid"
    return {"color": look.colour, "linewidth": width, "linestyle": style, "zorder": 3 if method == OURS else 2}


def _thinned(values: Doubles) -> Doubles:
    return np.append(values[:-1:EVERY], values[-1])


def _draw_oracle(axes: Axes, results: Results, labels: int) -> str:
    """What the title has to add: where the oracle is, if with it the others had less than two thirds of the height."""
    qualities = 100 * results.methods["oracle"][labels].curve.qualities
    low, high = axes.dataLim.intervaly
    if qualities.max() - low <= 1.5 * (high - low):
        _draw_curve(axes, results, "oracle", labels)
        return ""
    return f" (oracle, far above: {qualities.max():.1f})"


def _say_undefined(axes: Axes) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, "No curve: the best model was the cheapest, always.", ha="center", transform=axes.transAxes)


def _draw_areas(axes: Axes, results: Results) -> None:
    every = results.protocol.labels
    for method in (*best_rivals(results), OURS):
        areas = [100 * results.methods[method][labels].area.mean for labels in every]
        axes.plot(
            every, areas, **_line(method), marker="o", markersize=5 if method == OURS else 3, label=LOOKS[method].label
        )
    ours = [results.methods[OURS][labels].area for labels in every]
    low, high = [100 * area.low for area in ours], [100 * area.high for area in ours]
    axes.fill_between(every, low, high, color=LOOKS[OURS].colour, alpha=0.13, linewidth=0, label="ours, 95 % interval")
    axes.set_xscale("log")
    axes.set_xticks(every, [str(labels) for labels in every])
    axes.set_xticks([], minor=True)
    axes.set(title="Area under the deferral curve", xlabel="labels of each new model (N)", ylabel="Area ×100")


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One for both panels, below them, where no line can run into it."""
    found = {label: handle for panel in axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    order = [LOOKS[method].label for method in (OURS, *ESTIMATING, "random_mix", "best_single", "oracle")]
    shown = sorted(found, key=lambda label: order.index(label) if label in order else 0.5)
    figure.legend(
        [found[label] for label in shown],
        shown,
        loc="outside lower center",
        ncols=2 * len(axes),
        frameon=False,
        fontsize=9,
        handlelength=2.8,
    )
