"""What the lines of an outcomes file make together, what it cost, and what is wrong with it as a whole."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_core.errors import InvalidOutcomes
from router_core.evaluation.outcomes import Outcomes, outcomes_from_rows, read_outcomes
from router_core.types import Price

NAN = np.nan
PRICES = {"small": Price(1.0, 10.0), "large": Price(3.0, 30.0)}
BOTH = {"small": 0.0, "large": 1.0}


def some_outcomes(*rows: Mapping[str, Any], prices: Mapping[str, Price] = PRICES) -> Outcomes:
    return outcomes_from_rows(((f"line {number}", row) for number, row in enumerate(rows, 1)), prices)


def asked(prompt: str, scores: Mapping[str, float], **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "scores": scores, **more}


def test_models_are_sorted_and_unasked_ones_are_unlabelled() -> None:
    outcomes = some_outcomes(
        asked("a" * 8, {"small": 0.25, "large": 1}, source="letters"), asked("b" * 40, {"small": 1})
    )
    assert (outcomes.prompts, outcomes.models) == (("a" * 8, "b" * 40), ("large", "small"))
    np.testing.assert_array_equal(outcomes.scores, [[1.0, 0.25], [NAN, 1.0]])
    assert (outcomes.prompt_tokens.tolist(), outcomes.sources) == ([2.0, 10.0], ("letters", ""))
    assert outcomes.prices == (PRICES["large"], PRICES["small"])


def test_a_repeated_prompt_is_one_with_the_mean_of_its_figures() -> None:
    """Else it could be learned from and tested on."""
    outcomes = some_outcomes(
        asked("same", {"small": 1.0, "large": 0.5}, output_tokens={"small": 10}),
        asked("other", {"small": 0.0}),
        asked("same", {"small": 0.0}, output_tokens={"small": 30, "large": 5}, source="late"),
        asked("same", {"small": 0.5}, source="later"),
    )
    assert (outcomes.prompts, outcomes.sources) == (("same", "other"), ("late", ""))
    np.testing.assert_array_equal(outcomes.scores, [[0.5, 0.5], [NAN, 0.0]])
    np.testing.assert_array_equal(outcomes.output_tokens, [[5.0, 20.0], [NAN, NAN]])


def test_files_of_one_model_each_can_be_joined() -> None:
    outcomes = some_outcomes(asked("q", {"small": 0.0}), asked("r", {"small": 1.0}), asked("q", {"large": 1.0}))
    np.testing.assert_array_equal(outcomes.scores, [[1.0, 0.0], [NAN, 1.0]])


def test_an_answer_costs_its_prompt_and_its_measured_length() -> None:
    outcomes = some_outcomes(asked("a" * 8, BOTH, output_tokens={"small": 5, "large": 7}))
    np.testing.assert_array_equal(outcomes.usd(), [[2 * 3 + 7 * 30, 2 * 1 + 5 * 10]])


def test_an_unmeasured_length_is_the_models_mean_and_without_any_the_prompt_alone_is_billed() -> None:
    outcomes = some_outcomes(
        asked("a" * 4, BOTH, output_tokens={"small": 2}),
        asked("b" * 4, BOTH, output_tokens={"small": 4}),
        asked("c" * 4, BOTH),
    )
    np.testing.assert_array_equal(outcomes.usd(), [[3.0, 21.0], [3.0, 41.0], [3.0, 31.0]])


def test_selecting_keeps_prompts_models_and_figures_together() -> None:
    outcomes = some_outcomes(*(asked(letter * 4 * (n + 1), BOTH, source=letter) for n, letter in enumerate("abc")))
    part = outcomes.select(np.array([2, 0]), np.array([1]))
    assert (part.prompts, part.models, part.sources) == (("c" * 12, "aaaa"), ("small",), ("c", "a"))
    np.testing.assert_array_equal(part.usd(), [[3.0], [1.0]])
    assert outcomes.select(np.array([False, True, False])).prompts == ("b" * 8,)
    assert outcomes.select(slice(1, None)).scores.shape == (2, 2)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "the outcomes: there is no prompt in it"),
        ([asked("q", {"small": 1})], "the outcomes: 'small' is the only model scored; routing needs two models"),
        ([asked("q", BOTH), asked("r", {"smal": 1})], "line 2: 'smal' is scored but has no price"),
        ([asked("q", BOTH), asked("r", {"smal": 1})], "did you mean 'small'?"),
        ([asked("q", {"large": 1, "tiny": 1})], "line 1: 'tiny' is scored but has no price; add it to the prices"),
        ([asked("q", BOTH, output_tokens={"smalll": 4})], "line 1: output_tokens has 'smalll', which no line scores"),
        ([asked("q", BOTH), asked("r", {"small": 2})], "line 2: scores['small']"),
    ],
)
def test_errors_name_the_line_or_the_model(rows: Sequence[Mapping[str, Any]], told: str) -> None:
    with pytest.raises(InvalidOutcomes, match=re.escape(told)):
        some_outcomes(*rows)


def test_a_model_without_labels_is_named_not_left_out() -> None:
    with pytest.raises(InvalidOutcomes, match="'third' is priced but no line of the outcomes scores it; take it out"):
        some_outcomes(asked("q", BOTH), prices=PRICES | {"third": Price(1.0, 1.0)})
    many = {f"m{n:02}": Price(1.0, 1.0) for n in range(40)}
    with pytest.raises(InvalidOutcomes, match=r"'m00' is priced .*'m01', 'm02', 'm03', 'm04', 'm05' and 34 more$"):
        some_outcomes(asked("q", BOTH), prices=PRICES | many)


def test_files_are_read_with_their_names_in_every_message(tmp_path: Path) -> None:
    prices = {name: {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6} for name in BOTH}
    (tmp_path / "prices.json").write_text(json.dumps(prices))
    outcomes = tmp_path / "outcomes.jsonl.gz"
    outcomes.write_bytes(gzip.compress(json.dumps(asked("abcd", BOTH)).encode()))
    assert read_outcomes(outcomes, tmp_path / "prices.json").usd() == pytest.approx(1e-6)
    outcomes.write_bytes(b"\n\n")
    with pytest.raises(InvalidOutcomes, match=re.escape(f"{outcomes}: there is no prompt in it")):
        read_outcomes(outcomes, tmp_path / "prices.json")
    outcomes.write_bytes(json.dumps(asked("q", {"small": 1, "tiny": 1})).encode())
    with pytest.raises(InvalidOutcomes, match=r"gz, line 1: 'tiny' is scored.*add it to .*prices\.json"):
        read_outcomes(outcomes, tmp_path / "prices.json")


@given(st.lists(st.tuples(st.sampled_from("pqrs"), st.sampled_from(["small", "large"]), st.floats(0, 1)), max_size=30))
def test_joined_lines_are_means_in_the_unit_interval(told: list[tuple[str, str, float]]) -> None:
    rows = [asked("base", BOTH), *(asked(prompt, {model: score}) for prompt, model, score in told)]
    outcomes = some_outcomes(*rows)
    assert len(set(outcomes.prompts)) == len(outcomes.prompts) == len({row["prompt"] for row in rows})
    for prompt, model in {(prompt, model) for prompt, model, _ in told}:
        mean = np.mean([score for *where, score in told if where == [prompt, model]])
        found = outcomes.scores[outcomes.prompts.index(prompt), outcomes.models.index(model)]
        assert found == pytest.approx(mean)
        assert 0 <= found <= 1
