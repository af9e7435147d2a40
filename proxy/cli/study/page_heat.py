"""Ψ as a heat map of the page: which model errs on what. Names come from files, and are escaped here."""

from __future__ import annotations

from html import escape

import numpy as np

from proxy.cli.study.page_plots import Plot, PlotJson
from router_core.evaluation.results import HeatMap
from router_core.types import Indices

SCALE = ("#fdf4e3", "#f7c793", "#e98a5b", "#b8443a", "#5d1226")
"""From never wrong to always wrong, evenly spaced."""
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
