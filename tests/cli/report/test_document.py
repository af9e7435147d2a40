from __future__ import annotations

import json
from math import isnan
from typing import Any

import pytest

from proxy.cli.console import emit_json
from proxy.cli.report.text import document
from router_core.evaluation.study import METHODS, Results

BOUNDED = ("area", "paper_area", "paper_area_half", "peak", "qnc", "perf_gain", "cost_save")


def read(results: Results, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return the document as the command prints it."""
    emit_json(document(results))
    return dict(json.loads(capsys.readouterr().out))


def test_every_method_has_every_figure_at_every_n(studied: Results, capsys: pytest.CaptureFixture[str]) -> None:
    methods = read(studied, capsys)["methods"]
    expected = {f"{name}{end}" for name in BOUNDED for end in ("", "_low", "_high")} | {"reached", "area_trials"}
    assert list(methods) == list(METHODS)
    assert [list(by_labels) for by_labels in methods.values()] == [["10", "20", "40"]] * len(METHODS)
    assert all(set(figures) == expected for by_labels in methods.values() for figures in by_labels.values())


def test_qualities_are_a_hundredfold_and_shares_are_not(studied: Results, capsys: pytest.CaptureFixture[str]) -> None:
    printed, figures = read(studied, capsys)["methods"]["ours"]["20"], studied.methods["ours"][20]
    assert printed["area"] == pytest.approx(100 * figures.area.mean)
    assert printed["peak_high"] == pytest.approx(100 * figures.peak.high)
    assert (printed["qnc"], printed["reached"]) == pytest.approx((figures.qnc.mean, figures.reached))


def test_differences_and_choices_are_areas_too(studied: Results, capsys: pytest.CaptureFixture[str]) -> None:
    found = read(studied, capsys)
    assert found["differences"]["knn"]["20"]["mean"] == pytest.approx(100 * studied.differences["knn"][20].mean)
    assert "ours" not in found["differences"]
    assert found["chosen"]["20"]["area"] == pytest.approx(100 * studied.chosen[20].mean)
    assert found["chosen"]["20"]["difference_low"] == pytest.approx(100 * studied.chosen_differences[20].low)


def test_curves_are_relative_costs_and_qualities(studied: Results, capsys: pytest.CaptureFixture[str]) -> None:
    curve = read(studied, capsys)["curves"]["ours"]["20"]
    assert curve["costs"] == pytest.approx(studied.methods["ours"][20].curve.costs.tolist())
    assert curve["qualities"] == pytest.approx((100 * studied.methods["ours"][20].curve.qualities).tolist())


def test_the_protocol_says_how_to_run_it_again(studied: Results, capsys: pytest.CaptureFixture[str]) -> None:
    protocol = read(studied, capsys)["protocol"]
    assert (protocol["outcomes"], protocol["models"]) == ("toy.jsonl", ["left", "right"])
    assert (protocol["labels"], protocol["trials"], protocol["seed"]) == ([10, 20, 40], 3, 0)


def test_unknown_is_null(undefined: Results, capsys: pytest.CaptureFixture[str]) -> None:
    assert isnan(undefined.methods["ours"][20].area.mean)
    found = read(undefined, capsys)
    ours = found["methods"]["ours"]["20"]
    assert (ours["area"], ours["qnc_low"], ours["area_trials"]) == (None, None, 0)
    assert set(found["curves"]["ours"]["20"]["costs"]) == {None}
    assert found["differences"]["knn"]["20"] == {"mean": None, "low": None, "high": None}


def test_of_deployed_profiles_nothing_is_chosen(deployed: Results, capsys: pytest.CaptureFixture[str]) -> None:
    found = read(deployed, capsys)
    assert found["chosen"] == {}
    assert list(found["methods"]["ours"]) == ["40"]
