from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from proxy.cli.report.text import (
    LOOKS,
    OURS,
    MethodStyle,
    all_known,
    area_is_known,
    best_rivals,
    columns,
    headline,
    is_study,
    known,
    median_labels,
    number,
    percent,
    points,
    points_apart,
    protocol_sentences,
    ratio,
    undefined_sentence,
)
from router_core.evaluation.curves import Difference
from router_core.evaluation.study import Estimate, HeatMap, MethodMetrics, Results
from router_core.types import Indices

# From never wrong to always wrong, evenly spaced.
SCALE = ("#fdf4e3", "#f7c793", "#e98a5b", "#b8443a", "#5d1226")

ROW_PIXELS, AROUND_PIXELS = 18, 240


def heat_plot(heat_map: HeatMap) -> Plot:
    return Plot(
        "heat",
        "Who errs on what",
        "Each row is a cluster of prompts, hardest first, and each column a model, best first: the darker, the more"
        " often the model is wrong there. Hover to see the error rate, and how many labels it rests on.",
        {"": _figure(heat_map)},
        height=AROUND_PIXELS + ROW_PIXELS * len(heat_map.clusters),
        keyed=False,
    )


def _figure(heat_map: HeatMap) -> PlotJson:
    """By places, since two clusters may have the same name."""
    models: Indices = np.argsort(heat_map.errors.mean(axis=1), kind="stable")
    clusters: Indices = np.argsort(-heat_map.errors.mean(axis=0), kind="stable")
    last = len(SCALE) - 1
    trace = {
        "type": "heatmap",
        "z": np.round(heat_map.errors[np.ix_(models, clusters)].T, 4).tolist(),
        "zmin": 0.0,
        "zmax": 1.0,
        "colorscale": [[place / last, colour] for place, colour in enumerate(SCALE)],
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
        "text": [[_told(heat_map, model, cluster) for model in models] for cluster in clusters],
        "hovertemplate": "%{text}<extra></extra>",
    }
    across = {"side": "top", "tickangle": -90, **_named([heat_map.models[model] for model in models])}
    down = {"autorange": "reversed", **_named([heat_map.clusters[cluster] for cluster in clusters])}
    return {"data": [trace], "layout": {"xaxis": across, "yaxis": down}}


def _named(names: list[str]) -> PlotJson:
    ticks = {"tickvals": list(range(len(names))), "ticktext": [escape(name) for name in names], "ticks": ""}
    return ticks | {"tickfont": {"size": 11}, "showgrid": False, "zeroline": False}


def _told(heat_map: HeatMap, model: int, cluster: int) -> str:
    error, labels = heat_map.errors[model, cluster], heat_map.labels[model, cluster]
    names = f"{escape(heat_map.models[model])}<br>{escape(heat_map.clusters[cluster])}"
    return f"{names}<br>wrong {error:.0%}, by {labels:.1f} labels"


PlotJson = dict[str, Any]

# One model for all prompts: a point of the plane.
SINGLE = ("cheapest", "best_single")

RANDOM, CHOSEN = MethodStyle("random prompts", "random", "#e4572e"), MethodStyle("chosen prompts", "chosen", "#0e9f8e")


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
        chosen=str(median_labels(results)),
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


def _line(look: MethodStyle) -> PlotJson:
    width = 4 if look is LOOKS[OURS] else 2
    return {
        "color": look.colour,
        "width": width,
        "dash": ",".join(f"{width * length:g}px" for length in look.dashes) or "solid",
    }


def _area_bars(results: Results) -> Plot:
    methods = [*(best_rivals(results) or ["random_mix"]), OURS]
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
    others = best_rivals(results) or [method for method in results.differences if method != "oracle"]
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


def _dotted(
    look: MethodStyle, found: Sequence[Estimate | Difference], offset: float, *, joined: bool = True
) -> PlotJson:
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


FIGURES: Mapping[str, Callable[[MethodMetrics], str]] = {
    "Area ×100": lambda figures: points(figures.area),
    "QNC": lambda figures: ratio(figures.qnc),
    "reached": lambda figures: number(figures.reached, ".0%"),
    "peak ×100": lambda figures: points(figures.peak),
    "PerfGain": lambda figures: percent(figures.perf_gain),
    "CostSave": lambda figures: percent(figures.cost_save),
    "paper's Area ×100": lambda figures: points(figures.paper_area),
    "Area(50 %) ×100": lambda figures: points(figures.paper_area_half),
}

MEANINGS = (
    "Area: mean quality over all budgets between the cheapest and the best single model. QNC: the least cost that has"
    " the best single model's quality, as a share of that model's cost, where it is reached (in what share of trials)."
    " Peak: the best quality, whatever it costs. PerfGain and CostSave: over the best single model. The paper's Area is"
    " UniRoute's own, over cost ÷ the dearest model's, up to all or half of it."
)


def tables(results: Results) -> str:
    parts = [_heading("Area in numbers", "×100, with 95 % intervals."), _area_table(results)]
    parts += [
        _heading("Ours less each other", "Area ×100 on the same test prompts, with 95 % intervals."),
        _difference_table(results),
    ]
    if results.chosen:
        parts += [_heading("Chosen and random prompts in numbers", "Area ×100 of ours."), _share_table(results)]
    parts += [_heading("All figures", MEANINGS), *(_figures(results, labels) for labels in results.protocol.labels)]
    return "\n".join(parts)


def _heading(title: str, reading: str) -> str:
    return f'<h2>{escape(title)}</h2>\n<p class="reading">{escape(reading)}</p>'


def _area_table(results: Results) -> str:
    rows = {method: [points(each.area) for each in found.values()] for method, found in results.methods.items()}
    return _methods("Area", columns(results), rows)


def _difference_table(results: Results) -> str:
    rows = {method: [points_apart(each) for each in found.values()] for method, found in results.differences.items()}
    return _methods("Differences", columns(results), rows)


def _share_table(results: Results) -> str:
    random = results.methods[OURS]
    rows = [
        ("chosen", [points(found) for found in results.chosen.values()]),
        ("random", [points(random[labels].area) for labels in results.chosen]),
        ("chosen less random", [points_apart(found) for found in results.chosen_differences.values()]),
    ]
    return _table("Chosen and random prompts", columns(results), [_row(*row) for row in rows])


def _figures(results: Results, labels: int) -> str:
    rows = {method: [cell(found[labels]) for cell in FIGURES.values()] for method, found in results.methods.items()}
    opened = " open" if labels == median_labels(results) else ""
    shown = _methods(f"All figures, N = {labels}", list(FIGURES), rows)
    return f"<details{opened}><summary>N = {labels}</summary>\n{shown}\n</details>"


def _methods(name: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    return _table(
        name, columns, [_row(LOOKS[method].label, cells, ours=method == OURS) for method, cells in rows.items()]
    )


def _row(first: str, cells: Iterable[str], *, ours: bool = False) -> str:
    marked = ' class="ours"' if ours else ""
    return (
        f'<tr{marked}><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
    )


def _table(name: str, columns: Sequence[str], rows: Sequence[str]) -> str:
    """One that is wider than a phone is scrolled by itself, by keyboard too."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "\n".join(rows)
    return (
        f'<div class="scroll" role="region" aria-label="{escape(name)}" tabindex="0"><table>\n'
        f"<thead><tr><td></td>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def write_page(results: Results, path: Path) -> None:
    """About 5 MB, nearly all of it plotly's script. The page tells browsers to load nothing from anywhere."""
    from plotly.offline import get_plotlyjs

    heat = heat_plot(results.heat_map)
    plots = line_plots(results)
    page = Template(_asset("page.html")).substitute(
        title=escape(f"{'Routing study' if is_study(results) else 'Deployed profiles'}: {results.protocol.outcomes}"),
        style=_asset("page.css"),
        protocol=_protocol(results),
        plots="\n".join([*map(_section, plots), _section(heat, _scale())]),
        tables=tables(results),
        figures=_embedded([*plots, heat]),
        plotly=get_plotlyjs(),
        script=_asset("page.js"),
    )
    path.write_text(page, encoding="utf-8")


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")


def _protocol(results: Results) -> str:
    told = [f"<p>{escape(sentence)}</p>" for sentence in protocol_sentences(results)]
    marked = {"notice": undefined_sentence(results), "finding": headline(results)}
    return "\n".join(told + [f'<p class="{kind}">{escape(text)}</p>' for kind, text in marked.items() if text])


def _section(plot: Plot, above: str = "") -> str:
    keyed = " keyed" if plot.keyed else ""
    return (
        f'<section>\n<h2>{escape(plot.heading)}</h2>\n<p class="reading">{escape(plot.reading)}</p>\n'
        f"{_choice(plot) if len(plot.figures) > 1 else ''}{above}"
        f'<div class="plot{keyed}" id="{plot.id}" role="figure" aria-label="{escape(plot.heading)}"'
        f' style="height: {plot.height}px"></div>\n</section>'
    )


def _choice(plot: Plot) -> str:
    def button(value: str) -> str:
        checked = " checked" if value == plot.chosen else ""
        return f'<label><input type="radio" name="{plot.id}" value="{value}"{checked}>{value}</label>'

    return f"<fieldset><legend>Labels of each new model:</legend>{''.join(map(button, plot.figures))}</fieldset>\n"


def _scale() -> str:
    """What the colours of the heat map mean."""
    shades = f'<span style="background: linear-gradient(to right, {", ".join(SCALE)})"></span>'
    return f'<div class="scale">never wrong {shades} always wrong</div>\n'


def _embedded(plots: Sequence[Plot]) -> str:
    """No name may end the script that it stands in."""
    figures = {plot.id: plot.figures for plot in plots}
    return json.dumps(figures, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
