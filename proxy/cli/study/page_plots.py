"""The figures of the page but the heat map, as plotly's own JSON, and how to read them. The page's colours: page.js."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proxy.cli.study.document import all_known, known
from proxy.cli.study.names import LOOKS, OURS, Look
from proxy.cli.study.rivals import rivals
from proxy.cli.study.words import area_is_known, is_study, middle
from router_core.evaluation.intervals import Difference
from router_core.evaluation.results import Estimate, Results

PlotJson = dict[str, Any]
SINGLE = ("cheapest", "best_single")
"""One model for all prompts: a point of the plane."""
RANDOM, CHOSEN = Look("random prompts", "random", "#e4572e"), Look("chosen prompts", "chosen", "#0e9f8e")


@dataclass(frozen=True)
class Plot:
    id: str
    heading: str
    reading: str
    """How to read it."""
    figures: Mapping[str, PlotJson]
    """N → figure, where the reader chooses one; else one figure, whatever it is called."""
    height: int = 480
    """Pixels."""
    chosen: str = ""
    keyed: bool = True
    """Whether it has a legend, which takes room on a phone."""


def line_plots(results: Results) -> list[Plot]:
    if not area_is_known(results):
        return []
    plots = [_curves(results), _area_bars(results), _difference_bars(results)]
    return [*plots, _share_bars(results)] if is_study(results) else plots


def _curves(results: Results) -> Plot:
    return Plot(
        "curves",
        "Deferral curves",
        "Each line is a router, from its cheapest setting to its dearest: the higher, the better its answers for the"
        " same money. Diamonds are single models. The oracle, which knows all answers, is hidden: click its name.",
        {str(labels): _curve_figure(results, labels) for labels in results.protocol.labels},
        chosen=str(middle(results)),
    )


def _curve_figure(results: Results, labels: int) -> PlotJson:
    layout = {
        "xaxis": {"title": {"text": "mean cost ÷ the best single model's"}, "zeroline": False},
        "yaxis": {"title": {"text": "mean quality ×100"}, "zeroline": False},
    }
    front_last = sorted(results.methods, key=SINGLE.__contains__)
    return {"data": [_curve(results, method, labels) for method in front_last], "layout": layout}


def _curve(results: Results, method: str, labels: int) -> PlotJson:
    curve, look = results.methods[method][labels].curve, LOOKS[method]
    trace = {
        "name": look.label,
        "x": _short(all_known(curve.costs)),
        "y": _short(all_known(100 * curve.qualities)),
        "hovertemplate": "%{y:.1f} at %{x:.2f} of the cost",
    }
    if method in SINGLE:
        at = slice(-1, None) if method == "cheapest" else slice(1)
        marker = {"symbol": "diamond", "size": 11, "color": look.colour}
        return trace | {"x": trace["x"][at], "y": trace["y"][at], "mode": "markers", "marker": marker}
    hidden = {"visible": "legendonly"} if method == "oracle" else {}
    return trace | {"mode": "lines", "line": _line(look)} | hidden


def _line(look: Look) -> PlotJson:
    width = 4 if look is LOOKS[OURS] else 2
    return {
        "color": look.colour,
        "width": width,
        "dash": ",".join(f"{width * length:g}px" for length in look.dashes) or "solid",
    }


def _area_bars(results: Results) -> Plot:
    methods = [*(rivals(results) or ["random_mix"]), OURS]
    data = [
        _dotted(
            LOOKS[method], [figures.area for figures in results.methods[method].values()], _beside(number, len(methods))
        )
        for number, method in enumerate(methods)
    ]
    return Plot(
        "areas",
        "Area against labels",
        "Each dot is the mean quality over all budgets: the higher, the better. Bars are 95 % intervals, long where"
        " test prompts and models differ for all methods alike: the next figure leaves that out.",
        {"": {"data": data, "layout": _by_labels(results, "Area ×100")}},
    )


def _difference_bars(results: Results) -> Plot:
    others = rivals(results) or [method for method in results.differences if method != "oracle"]
    data = [
        _dotted(LOOKS[method], list(results.differences[method].values()), _beside(number, len(others)), joined=False)
        for number, method in enumerate(others)
    ]
    return Plot(
        "differences",
        "Ours less each rival",
        "Above zero, ours has more Area than that rival on the same test prompts; where the 95 % interval crosses zero,"
        " the two cannot be told apart.",
        {"": {"data": data, "layout": _by_labels(results, "difference of Area ×100")}},
    )


def _share_bars(results: Results) -> Plot:
    random = [figures.area for figures in results.methods[OURS].values()]
    chosen, apart = list(results.chosen.values()), list(results.chosen_differences.values())
    data = [
        _dotted(RANDOM, random, -0.04),
        _dotted(CHOSEN, chosen, 0.04),
        _dotted(CHOSEN, apart, 0.0, joined=False) | {"name": "chosen less random", "yaxis": "y2"},
    ]
    layout = _by_labels(results, "Area ×100") | {
        "yaxis": {"title": {"text": "Area ×100"}, "domain": [0.46, 1.0], "zeroline": False},
        "yaxis2": {"title": {"text": "difference"}, "domain": [0.0, 0.36], "zeroline": True},
    }
    layout["xaxis"] |= {"anchor": "y2"}
    return Plot(
        "chosen",
        "Chosen prompts against random ones",
        "Above: ours, where a new model answers N random prompts, and N that are chosen as uniroute models add"
        " chooses. Below: the difference on the same test prompts; above zero, choosing helps.",
        {"": {"data": data, "layout": layout}},
        height=560,
    )


def _beside(number: int, of: int) -> float:
    """How far the bars of one method stand from the middle, so that no two lie upon each other."""
    return 0.09 * (number - (of - 1) / 2)


def _dotted(look: Look, found: Sequence[Estimate | Difference], offset: float, *, joined: bool = True) -> PlotJson:
    """One dot at each N with its interval, `offset` from the middle of the N."""
    return {
        "name": look.label,
        "mode": "lines+markers" if joined else "markers",
        "x": [place + offset for place in range(len(found))],
        "y": _short([known(100 * each.mean) for each in found]),
        "error_y": {
            "array": _short([known(100 * (each.high - each.mean)) for each in found]),
            "arrayminus": _short([known(100 * (each.mean - each.low)) for each in found]),
            "thickness": 1.3,
            "width": 0,
            "color": look.colour,
        },
        "line": _line(look),
        "marker": {"size": 9 if look is LOOKS[OURS] else 6, "color": look.colour},
        "hovertemplate": "%{y:.2f} (+%{error_y.array:.2f} −%{error_y.arrayminus:.2f})",
    }


def _by_labels(results: Results, title: str) -> PlotJson:
    """Places instead of a logarithm: N mostly doubles, and what stands beside a place stays near it."""
    every = results.protocol.labels
    places = {"tickvals": list(range(len(every))), "ticktext": [str(labels) for labels in every]}
    x = {"title": {"text": "N, labels of each model"}, "zeroline": False, "range": [-0.5, len(every) - 0.5]}
    return {"xaxis": x | places, "yaxis": {"title": {"text": title}}}


def _short(values: Sequence[float | None]) -> list[float | None]:
    """A screen has no use for more digits, and the file would be the longer."""
    return [None if value is None else round(value, 4) for value in values]
