from __future__ import annotations

from dataclasses import replace

import pytest

from proxy.cli.evaluate import print_summary
from proxy.cli.report.text import LOOKS, best_rival_of_each_size, headline
from router_core.evaluation.curves import Difference
from router_core.evaluation.study import ESTIMATED, METHODS, Estimate, Results


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> list[str]:
    """Return the printed lines of the results that the test names."""
    print_summary(request.getfixturevalue(request.param))
    return capsys.readouterr().out.splitlines()


def of(results: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("printed", [results], indirect=True)


def row(printed: list[str], first: str) -> str:
    """Return the first row that begins so."""
    return next(line for line in printed if line.strip().startswith(first))


@of("studied")
def test_what_was_run_is_said_first(printed: list[str]) -> None:
    assert printed[:3] == [
        "toy.jsonl: 60 prompts, 2 models.",
        "In each of 3 trials (seed 0) all 2 models are new, and none is known.",
        "A new model is seen through its answers to N prompts; 18 others are routed, among the new models.",
    ]
    assert printed[3] == "The file has no lengths of answers: the prompt alone is billed."


@of("studied")
def test_every_method_has_its_area_at_every_n(printed: list[str]) -> None:
    assert [row(printed, look.label).count("[") for look in LOOKS.values()] == [3] * len(LOOKS)


def test_every_method_of_a_study_has_a_name_in_the_same_order() -> None:
    assert tuple(LOOKS) == METHODS


def test_a_figure_is_shown_a_hundredfold_with_its_interval(
    studied: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = replace(studied.methods["knn"][10], area=Estimate(0.5, 0.25, 0.625, 3))
    print_summary(replace(studied, methods={**studied.methods, "knn": {**studied.methods["knn"], 10: figures}}))
    assert "50.0 [25.0, 62.5]" in row(capsys.readouterr().out.splitlines(), "k nearest neighbours")


def where_ridge_is_close(studied: Results, *, by: float = -0.002) -> Results:
    """Return results where only the estimating rivals are behind by more, and a single model is far behind."""
    apart = {method: dict.fromkeys((10, 20, 40), Difference(0.01, 0.0, 0.02)) for method in studied.differences}
    return replace(studied, differences=apart | {"ridge": dict.fromkeys((10, 20, 40), Difference(by, -0.01, 0.01))})


def test_the_best_rival_is_the_one_that_ours_is_least_ahead_of(
    studied: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    print_summary(where_ridge_is_close(studied))
    lines = capsys.readouterr().out.splitlines()
    assert row(lines, "* the best rival").split()[4:] == ["ridge"] * 3
    assert row(lines, "less the best rival").count("-0.20 [-1.00, +1.00]") == 3
    assert [line.count("*") for line in lines if line.strip().startswith("less ")].count(3) == 1


def test_only_a_method_that_estimates_errors_can_be_the_best_rival(studied: Results) -> None:
    behind = where_ridge_is_close(studied)
    oracle = dict.fromkeys((10, 20, 40), Difference(-0.3, -0.4, -0.2))
    assert set(
        best_rival_of_each_size(replace(behind, differences={**behind.differences, "oracle": oracle})).values()
    ) == {"ridge"}
    assert "ridge" in ESTIMATED


def test_the_finding_is_of_the_n_in_the_middle(studied: Results) -> None:
    assert headline(where_ridge_is_close(studied)).startswith("With 20 labels")
    assert headline(where_ridge_is_close(studied)).endswith("ridge regression, it is -0.20 [-1.00, +1.00].")


@of("partly")
def test_trials_without_an_area_are_counted(printed: list[str]) -> None:
    assert (
        "Area is undefined in 1 of 3 trials: the best new model was the cheapest. The others are averaged." in printed
    )


@of("undefined")
def test_what_no_trial_defines_is_a_dash(printed: list[str]) -> None:
    assert "Area is undefined in 3 of 3 trials: the best new model was the cheapest." in printed
    assert row(printed, "ours ").split()[1:] == ["–"] * 3
    assert "nan" not in "\n".join(printed)


@of("studied")
def test_chosen_prompts_stand_beside_random_ones(printed: list[str]) -> None:
    assert row(printed, "N  ").split() == ["N", "chosen", "random", "chosen", "less", "random"]
    assert [line.count("[") for line in printed[-3:]] == [3, 3, 3]


@of("deployed")
def test_of_deployed_profiles_no_trial_is_told_and_no_choice(printed: list[str]) -> None:
    assert "500 bootstrap draws" in printed[3]
    assert [line for line in printed if "trial" in line or "chosen" in line or "best rival" in line] == []


def test_the_table_for_one_n_is_of_the_n_that_is_asked_for(
    studied: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    print_summary(studied, 40)
    assert row(capsys.readouterr().out.splitlines(), "N = 40 ").split()[3:5] == ["QNC", "reached"]
