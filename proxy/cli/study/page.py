"""A study as one page that needs nothing else: no network, no other file. Figures first, then all numbers as tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from proxy.cli.study.page_heat import SCALE, heat_plot
from proxy.cli.study.page_plots import Plot, line_plots
from proxy.cli.study.page_tables import tables
from proxy.cli.study.rivals import finding
from proxy.cli.study.words import is_study, protocol_sentences, undefined_sentence
from router_core.evaluation.results import Results


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
    marked = {"notice": undefined_sentence(results), "finding": finding(results)}
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
