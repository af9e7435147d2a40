"""Deployed profiles on an outcomes file: four prompts, of which the cheap model can do two."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from router_core.errors import InvalidInput, InvalidOutcomes
from router_core.evaluation.deployed import evaluate_deployed, read_deployed
from router_core.evaluation.outcomes import Outcomes, outcomes_from_rows
from router_core.evaluation.study import Results
from router_core.pool import Pool
from router_core.types import Price
from tests.router_core.makers import a_candidate, a_pool, an_assignment

CHEAP, EXPENSIVE = Price(0.0, 1e-4), Price(0.0, 11e-4)
LENGTHS = {"cheap": 100, "dear": 100}
RIGHT = {"cheap": 1.0, "dear": 1.0}
HARD = {"cheap": 0.0, "dear": 1.0}


def the_pool(*more: Any) -> Pool:
    cheap = a_candidate("cheap", (0.0, 1.0, 0.5), CHEAP)
    return a_pool(cheap, a_candidate("dear", (0.0, 0.0, 0.0), EXPENSIVE), *more)


def the_outcomes(*scores: Mapping[str, float], lengths: bool = True) -> Outcomes:
    rows = [
        {"prompt": f"p{number}", "scores": scored, "output_tokens": {name: 100 for name in scored if lengths}}
        for number, scored in enumerate(scores or (RIGHT, RIGHT, HARD, HARD))
    ]
    prices = {"cheap": CHEAP, "dear": EXPENSIVE, "other": CHEAP}
    names = {name for row in rows for name in row["scores"]}
    return outcomes_from_rows([("a line", row) for row in rows], {name: prices[name] for name in names})


def the_results(outcomes: Outcomes | None = None, **more: Any) -> Results:
    outcomes = outcomes or the_outcomes()
    clusters = [0, 0, 1, 1][: len(outcomes.prompts)]
    return evaluate_deployed(
        outcomes, the_pool(), an_assignment(*clusters), outcomes_name="file", embedder_id="toy", draws=50, **more
    )


def test_good_profiles_halve_the_cost_at_full_quality() -> None:
    """Two prompts at 1, two at 11: a mean of 6, where the dear model alone costs 11."""
    ours = the_results().methods["ours"][300]
    assert (ours.peak.mean, ours.qnc.mean, ours.cost_save.mean) == pytest.approx((1.0, 6 / 11, 5 / 11))
    assert ours.area.mean == pytest.approx(the_results().methods["oracle"][300].area.mean)


def test_other_methods_are_reported_with_their_difference_from_ours() -> None:
    results = the_results()
    assert list(results.methods) == ["cheapest", "best_single", "random_mix", "ours", "oracle"]
    assert results.methods["cheapest"][300].peak.mean == 0.5
    assert results.methods["best_single"][300].area.mean == pytest.approx(0.5, abs=0.01)
    gap = results.differences["random_mix"][300]
    assert 0 < gap.mean == results.methods["ours"][300].area.mean - results.methods["random_mix"][300].area.mean
    assert gap.low <= gap.mean <= gap.high


def test_all_prompts_are_tested_and_labels_are_those_of_the_profiles() -> None:
    protocol = the_results().protocol
    assert (protocol.prompts, protocol.test_prompts, protocol.labels) == (4, 4, (300,))
    assert (protocol.models, protocol.outcomes, protocol.measured_lengths) == (("cheap", "dear"), "file", True)


def test_the_same_seed_draws_the_same_prompts() -> None:
    one, again = (the_results(seed=1).methods["ours"][300].peak for _ in range(2))
    assert (one, one.trials) == (again, 50)


def test_a_prompt_that_one_model_has_no_score_on_is_left_out() -> None:
    results = the_results(the_outcomes(RIGHT, HARD, {"dear": 0.0}, {"cheap": 1.0}))
    assert (results.protocol.prompts, results.protocol.test_prompts) == (4, 2)
    with pytest.raises(InvalidInput, match="no prompt of the outcomes is scored for all of cheap, dear"):
        the_results(the_outcomes({"dear": 0.0}, {"cheap": 1.0}))


def test_answers_of_unknown_length_are_neither_billed_nor_expected() -> None:
    results = the_results(the_outcomes(RIGHT, RIGHT, HARD, HARD, lengths=False))
    assert not results.protocol.measured_lengths
    assert np.isnan(results.methods["ours"][300].area.mean)


def test_models_that_only_one_side_has_are_ignored_or_reported(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.jsonl"
    lines = [{"prompt": "p", "scores": {**HARD, "gone": 1.0}}, {"prompt": "q", "scores": {"gone": 0.5}}]
    path.write_text("\n".join(map(json.dumps, lines)))
    outcomes, common = read_deployed(path, the_pool(a_candidate("new"), a_candidate("unpriced", price=None)))
    assert (common.models, common.only_scored, common.only_deployed) == (("cheap", "dear"), ("gone",), ("new",))
    assert (outcomes.prompts, outcomes.models, outcomes.prices) == (("p",), ("cheap", "dear"), (CHEAP, EXPENSIVE))
    with pytest.raises(InvalidInput, match=r"Both: dear\. Only scored: cheap, gone\. Only deployed: new"):
        read_deployed(path, a_pool(a_candidate("dear"), a_candidate("new")))


def test_a_broken_line_is_reported_before_anything_is_computed(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.jsonl"
    path.write_text('{"prompt": "p", "scores": {"gone": 7}}')
    with pytest.raises(InvalidOutcomes, match=r"line 1: scores\['gone'\] must be"):
        read_deployed(path, the_pool())


def test_only_deployed_models_of_a_file_are_evaluated() -> None:
    more = the_outcomes(*({**scores, "other": 1.0} for scores in (RIGHT, RIGHT, HARD, HARD)))
    assert the_results(more).methods["ours"][300].qnc == the_results().methods["ours"][300].qnc


def test_the_heat_map_is_that_of_the_deployed_profiles() -> None:
    heat_map = the_results().heat_map
    assert (heat_map.models, heat_map.clusters) == (("cheap", "dear"), ("a", "b", "c"))
    np.testing.assert_array_equal(heat_map.errors, [[0.0, 1.0, 0.5], [0.0, 0.0, 0.0]])
