from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from proxy.cli.report.html import write_page
from router_core.evaluation.study import Results


class Page(HTMLParser):
    """Parse the page as a browser would."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.figures: dict[str, Any] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        tag, attributes = self.tags[-1] if self.tags else ("", {})
        if not data.strip():
            return
        if attributes.get("id") == "figures":
            self.figures = json.loads(data)
        elif tag not in {"script", "style"}:
            self.texts.append(data.strip())


def opened(results: Results, folder: Path) -> Page:
    write_page(results, folder / "page.html")
    return Page((folder / "page.html").read_text("utf-8"))


def test_it_loads_nothing_from_anywhere(studied: Results, tmp_path: Path) -> None:
    page = opened(studied, tmp_path)
    assert [tag for tag, attributes in page.tags if {"src", "href", "srcset"} & set(attributes)] == []
    policy = next(attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_it_has_its_figures_and_all_numbers(studied: Results, tmp_path: Path) -> None:
    page = opened(studied, tmp_path)
    assert list(page.figures) == ["curves", "areas", "differences", "chosen", "heat"]
    assert set(page.figures) == {attributes["id"] for _, attributes in page.tags if "plot" in _classes(attributes)}
    assert list(page.figures["curves"]) == ["10", "20", "40"]
    assert [tag for tag, _ in page.tags].count("table") == 3 + 3


def test_the_curves_begin_with_the_n_in_the_middle(studied: Results, tmp_path: Path) -> None:
    radios = [attributes for tag, attributes in opened(studied, tmp_path).tags if tag == "input"]
    assert [attributes["value"] for attributes in radios if "checked" in attributes] == ["20"]


def test_names_from_files_are_shown_and_never_run(named_badly: Results, tmp_path: Path) -> None:
    page = opened(named_badly, tmp_path)
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert "img" not in {tag for tag, _ in page.tags}
    assert any("<img src=x" in text for text in page.texts)
    axes = page.figures["heat"][""]["layout"]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in axes["xaxis"]["ticktext"]
    assert "&lt;/script&gt;&lt;script&gt;alert(2)&lt;/script&gt;" in axes["yaxis"]["ticktext"]


def test_the_heat_map_puts_the_best_model_and_the_hardest_cluster_first(studied: Results, tmp_path: Path) -> None:
    heat_map = studied.heat_map
    best, hardest = heat_map.errors.mean(axis=1).argmin(), heat_map.errors.mean(axis=0).argmax()
    figure = opened(studied, tmp_path).figures["heat"][""]
    assert figure["layout"]["xaxis"]["ticktext"][0] == heat_map.models[best]
    assert figure["layout"]["yaxis"]["ticktext"][0] == heat_map.clusters[hardest]
    assert figure["data"][0]["z"][0][0] == pytest.approx(heat_map.errors[best, hardest], abs=1e-4)


def test_without_an_area_in_any_trial_the_page_says_so_and_draws_no_line(undefined: Results, tmp_path: Path) -> None:
    page = opened(undefined, tmp_path)
    assert "Area is undefined in 3 of 3 trials: the best new model was the cheapest." in page.texts
    assert list(page.figures) == ["heat"]


def test_deployed_profiles_have_a_page_too(deployed: Results, tmp_path: Path) -> None:
    page = opened(deployed, tmp_path)
    assert list(page.figures) == ["curves", "areas", "differences", "heat"]
    assert "input" not in {tag for tag, _ in page.tags}


def _classes(attributes: dict[str, str | None]) -> list[str]:
    return (attributes.get("class") or "").split()
