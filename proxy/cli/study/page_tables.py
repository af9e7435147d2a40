"""The figures of the page as real tables, all with their intervals. Every cell is escaped here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from proxy.cli.study.names import LOOKS, OURS
from proxy.cli.study.numbers import number, percent, points, points_apart, ratio
from proxy.cli.study.words import columns, middle
from router_core.evaluation.results import MethodFigures, Results

FIGURES: Mapping[str, Callable[[MethodFigures], str]] = {
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
    opened = " open" if labels == middle(results) else ""
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
