from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from proxy.cli.report.svg import write_svg
from router_core.evaluation.study import Results

TEXT = "{http://www.w3.org/2000/svg}text"


def texts(path: Path) -> list[str]:
    """Return the texts of an SVG file."""
    return ["".join(element.itertext()).strip() for element in ElementTree.parse(path).iter(TEXT)]


def drawn(results: Results, path: Path, labels: int | None = None) -> list[str]:
    write_svg(results, path, labels)
    return texts(path)


def test_the_same_results_make_the_same_bytes(studied: Results, tmp_path: Path) -> None:
    for name in ("one.svg", "other.svg"):
        write_svg(studied, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()


def test_it_is_small_and_names_what_it_shows(studied: Results, tmp_path: Path) -> None:
    drawn_texts = drawn(studied, tmp_path / "it.svg")
    assert {"ours", "K-means, raw (UniRoute)", "best single model", "Area ×100"} <= set(drawn_texts)
    assert (tmp_path / "it.svg").stat().st_size < 100_000


def test_the_curves_are_of_the_n_that_is_asked_for_or_the_middle_one(studied: Results, tmp_path: Path) -> None:
    assert any(text.startswith("Deferral curves, 20 labels") for text in drawn(studied, tmp_path / "a.svg"))
    assert any(text.startswith("Deferral curves, 40 labels") for text in drawn(studied, tmp_path / "b.svg", 40))


@pytest.mark.parametrize("results", ["undefined", "partly", "deployed"])
def test_whatever_a_study_found_can_be_drawn(results: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    assert drawn(request.getfixturevalue(results), tmp_path / "it.svg")


def test_where_there_is_no_curve_that_is_said(undefined: Results, tmp_path: Path) -> None:
    assert drawn(undefined, tmp_path / "it.svg") == ["No curve: the best model was the cheapest, always."]


def test_one_n_needs_no_panel_of_areas(deployed: Results, tmp_path: Path) -> None:
    assert "Area ×100" not in drawn(deployed, tmp_path / "it.svg")
