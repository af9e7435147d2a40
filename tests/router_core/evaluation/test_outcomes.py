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
from router_core.evaluation import outcomes as outcomes_module
from router_core.evaluation.outcomes import (
    Outcomes,
    outcomes_from_rows,
    parse_row,
    read_outcomes,
    read_prices,
    read_rows,
)
from router_core.types import Price

NAN = np.nan
PRICES = {"small": Price(1.0, 10.0), "large": Price(3.0, 30.0)}
BOTH = {"small": 0.0, "large": 1.0}


def some_outcomes(*rows: Mapping[str, Any], prices: Mapping[str, Price] = PRICES) -> Outcomes:
    return outcomes_from_rows(((f"line {number}", row) for number, row in enumerate(rows, 1)), prices)


def a_row(prompt: str, scores: Mapping[str, float], **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "scores": scores, **more}


def test_models_are_sorted_and_unasked_ones_are_unlabelled() -> None:
    outcomes = some_outcomes(
        a_row("a" * 8, {"small": 0.25, "large": 1}, source="letters"), a_row("b" * 40, {"small": 1})
    )
    assert (outcomes.prompts, outcomes.models) == (("a" * 8, "b" * 40), ("large", "small"))
    np.testing.assert_array_equal(outcomes.scores, [[1.0, 0.25], [NAN, 1.0]])
    assert (outcomes.prompt_tokens.tolist(), outcomes.sources) == ([2.0, 10.0], ("letters", ""))
    assert outcomes.prices == (PRICES["large"], PRICES["small"])


def test_a_repeated_prompt_is_one_with_the_mean_of_its_figures() -> None:
    """Else it could be learned from and tested on."""
    outcomes = some_outcomes(
        a_row("same", {"small": 1.0, "large": 0.5}, output_tokens={"small": 10}),
        a_row("other", {"small": 0.0}),
        a_row("same", {"small": 0.0}, output_tokens={"small": 30, "large": 5}, source="late"),
        a_row("same", {"small": 0.5}, source="later"),
    )
    assert (outcomes.prompts, outcomes.sources) == (("same", "other"), ("late", ""))
    np.testing.assert_array_equal(outcomes.scores, [[0.5, 0.5], [NAN, 0.0]])
    np.testing.assert_array_equal(outcomes.output_tokens, [[5.0, 20.0], [NAN, NAN]])


def test_files_of_one_model_each_can_be_joined() -> None:
    outcomes = some_outcomes(a_row("q", {"small": 0.0}), a_row("r", {"small": 1.0}), a_row("q", {"large": 1.0}))
    np.testing.assert_array_equal(outcomes.scores, [[1.0, 0.0], [NAN, 1.0]])


def test_an_answer_costs_its_prompt_and_its_measured_length() -> None:
    outcomes = some_outcomes(a_row("a" * 8, BOTH, output_tokens={"small": 5, "large": 7}))
    np.testing.assert_array_equal(outcomes.usd(), [[2 * 3 + 7 * 30, 2 * 1 + 5 * 10]])


def test_an_unmeasured_length_is_the_models_mean_and_without_any_the_prompt_alone_is_billed() -> None:
    outcomes = some_outcomes(
        a_row("a" * 4, BOTH, output_tokens={"small": 2}),
        a_row("b" * 4, BOTH, output_tokens={"small": 4}),
        a_row("c" * 4, BOTH),
    )
    np.testing.assert_array_equal(outcomes.usd(), [[3.0, 21.0], [3.0, 41.0], [3.0, 31.0]])


def test_selecting_keeps_prompts_models_and_figures_together() -> None:
    outcomes = some_outcomes(*(a_row(letter * 4 * (n + 1), BOTH, source=letter) for n, letter in enumerate("abc")))
    part = outcomes.select(np.array([2, 0]), np.array([1]))
    assert (part.prompts, part.models, part.sources) == (("c" * 12, "aaaa"), ("small",), ("c", "a"))
    np.testing.assert_array_equal(part.usd(), [[3.0], [1.0]])
    assert outcomes.select(np.array([False, True, False])).prompts == ("b" * 8,)
    assert outcomes.select(slice(1, None)).scores.shape == (2, 2)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the outcomes: there is no prompt in it"),
        ([a_row("q", {"small": 1})], "the outcomes: 'small' is the only model scored; routing needs two models"),
        ([a_row("q", BOTH), a_row("r", {"smal": 1})], "line 2: 'smal' is scored but has no price"),
        ([a_row("q", BOTH), a_row("r", {"smal": 1})], "did you mean 'small'?"),
        ([a_row("q", {"large": 1, "tiny": 1})], "line 1: 'tiny' is scored but has no price; add it to the prices"),
        ([a_row("q", BOTH, output_tokens={"smalll": 4})], "line 1: output_tokens has 'smalll', which no line scores"),
        ([a_row("q", BOTH), a_row("r", {"small": 2})], "line 2: scores['small']"),
    ],
)
def test_errors_name_the_line_or_the_model(rows: Sequence[Mapping[str, Any]], message: str) -> None:
    with pytest.raises(InvalidOutcomes, match=re.escape(message)):
        some_outcomes(*rows)


def test_a_model_without_labels_is_named_not_left_out() -> None:
    with pytest.raises(InvalidOutcomes, match="'third' is priced but no line of the outcomes scores it; take it out"):
        some_outcomes(a_row("q", BOTH), prices=PRICES | {"third": Price(1.0, 1.0)})
    many = {f"m{n:02}": Price(1.0, 1.0) for n in range(40)}
    with pytest.raises(InvalidOutcomes, match=r"'m00' is priced .*'m01', 'm02', 'm03', 'm04', 'm05' and 34 more$"):
        some_outcomes(a_row("q", BOTH), prices=PRICES | many)


def test_files_are_read_with_their_names_in_every_message(tmp_path: Path) -> None:
    prices = {name: {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6} for name in BOTH}
    (tmp_path / "prices.json").write_text(json.dumps(prices))
    outcomes = tmp_path / "outcomes.jsonl.gz"
    outcomes.write_bytes(gzip.compress(json.dumps(a_row("abcd", BOTH)).encode()))
    assert read_outcomes(outcomes, tmp_path / "prices.json").usd() == pytest.approx(1e-6)
    outcomes.write_bytes(b"\n\n")
    with pytest.raises(InvalidOutcomes, match=re.escape(f"{outcomes}: there is no prompt in it")):
        read_outcomes(outcomes, tmp_path / "prices.json")
    outcomes.write_bytes(json.dumps(a_row("q", {"small": 1, "tiny": 1})).encode())
    with pytest.raises(InvalidOutcomes, match=r"gz, line 1: 'tiny' is scored.*add it to .*prices\.json"):
        read_outcomes(outcomes, tmp_path / "prices.json")


@given(st.lists(st.tuples(st.sampled_from("pqrs"), st.sampled_from(["small", "large"]), st.floats(0, 1)), max_size=30))
def test_joined_lines_are_means_in_the_unit_interval(joined: list[tuple[str, str, float]]) -> None:
    rows = [a_row("base", BOTH), *(a_row(prompt, {model: score}) for prompt, model, score in joined)]
    outcomes = some_outcomes(*rows)
    assert len(set(outcomes.prompts)) == len(outcomes.prompts) == len({row["prompt"] for row in rows})
    for prompt, model in {(prompt, model) for prompt, model, _ in joined}:
        mean = np.mean([score for *where, score in joined if where == [prompt, model]])
        found = outcomes.scores[outcomes.prompts.index(prompt), outcomes.models.index(model)]
        assert found == pytest.approx(mean)
        assert 0 <= found <= 1


ROW = {"prompt": "2 + 2?", "scores": {"small": 1}}
LINE = json.dumps(ROW).encode()


def row(**changes: Any) -> dict[str, Any]:
    return {**ROW, **changes}


def written(tmp_path: Path, content: bytes, name: str = "outcomes.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def test_a_row_has_each_models_figures_and_ignores_other_fields() -> None:
    parsed = parse_row(
        "line 1", row(id=7, source="sums", output_tokens={"small": 3}, seconds={"small": 0.5}, remark=[])
    )
    assert (parsed.prompt, parsed.source, parsed.scores) == ("2 + 2?", "sums", {"small": 1.0})
    assert (parsed.output_tokens, parsed.seconds) == ({"small": 3.0}, {"small": 0.5})


def test_figures_that_are_not_stated_are_absent_and_not_zero() -> None:
    parsed = parse_row("line 1", row(output_tokens=None))
    assert (parsed.source, parsed.output_tokens, parsed.seconds) == ("", {}, {})


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"scores": {"small": 1}}, '"prompt"'),
        (row(prompt=" \n"), '"prompt"'),
        (row(prompt=["2 + 2?"]), '"prompt"'),
        ({"prompt": "2 + 2?"}, '"scores"'),
        (row(scores={}), '"scores"'),
        (row(scores=[1.0]), '"scores"'),
        (row(scores={"small": 1.5}), "scores['small'] must be a number from 0 to 1; got 1.5"),
        (row(scores={"small": -0.1}), "got -0.1"),
        (row(scores={"small": True}), "got True"),
        (row(scores={"small": "1"}), "got '1'"),
        (row(scores={"small": None}), "leave out who was not asked"),
        (row(scores={"small": float("nan")}), "got nan"),
        (row(output_tokens={"small": -1}), "output_tokens['small'] must be a number from 0 to 1e+09; got -1"),
        (row(output_tokens={"small": 10**400}), "leave out what was not measured"),
        (row(output_tokens={"small": float("inf")}), "got inf"),
        (row(output_tokens=12), '"output_tokens" must be an object'),
        (row(seconds={"small": "fast"}), "seconds['small']"),
        (row(source=3), '"source"'),
        (row(scores={"\ud800": 1}), "scores names '\\ud800', a lone surrogate"),
    ],
)
def test_an_unusable_row_is_refused_with_its_line_and_value(broken: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOutcomes, match=rf"^line 7: .*{re.escape(message)}"):
        parse_row("line 7", broken)


def test_lines_are_counted_as_an_editor_counts_them(tmp_path: Path) -> None:
    """Windows line ends, a byte order mark and blank lines; U+2028 within a prompt is no line end."""
    path = written(tmp_path, b"\xef\xbb\xbf" + LINE + b"\r\n\r\n" + '{"prompt": "a\u2028b"}'.encode())
    assert list(read_rows(path)) == [(f"{path}, line 1", ROW), (f"{path}, line 3", {"prompt": "a\u2028b"})]


@pytest.mark.parametrize("name", ["outcomes.jsonl.gz", "outcomes.jsonl"])
def test_gzip_is_recognised_by_content_and_not_by_name(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, gzip.compress(LINE), name)
    assert [found for _, found in read_rows(path)] == [ROW]
    assert [found for _, found in read_rows(written(tmp_path, LINE, name))] == [ROW]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (b"{'prompt': 1}", "is not JSON"),
        (b"[1]", r"must be a JSON object; got \[1\]"),
        (b'{"prompt": "a", "prompt": "b"}', r"is not usable JSON \('prompt' is stated twice: keep one"),
        (b'{"scores": {"a": 1, "a": 0}}', r"is not usable JSON \('a' is stated twice: keep one"),
        (b"[" * 100_000, "is not usable JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "is not usable JSON"),
        (b'{"prompt": "caf\xe9"}', "is not UTF-8 text at byte 16"),
    ],
)
def test_a_line_that_is_no_json_object_is_named(tmp_path: Path, second: bytes, message: str) -> None:
    path = written(tmp_path, LINE + b"\n" + second)
    with pytest.raises(InvalidOutcomes, match=rf"^{re.escape(str(path))}, line 2: {message}"):
        list(read_rows(path))


def test_an_endless_line_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes_module, "MAX_LINE_BYTES", len(LINE))
    assert len(list(read_rows(written(tmp_path, LINE)))) == 1
    with pytest.raises(InvalidOutcomes, match="line 1: is longer than"):
        list(read_rows(written(tmp_path, LINE + b" ")))


@pytest.mark.parametrize("damage", [lambda whole: whole[:-12], lambda whole: whole[:30] + b"\xff" * 30 + whole[60:]])
def test_a_gzip_file_that_was_cut_off_or_damaged_says_so(tmp_path: Path, damage: Any) -> None:
    whole = gzip.compress(b"\n".join(json.dumps(row(prompt=f"{n} + {n * n}?")).encode() for n in range(100)))
    path = written(tmp_path, damage(whole), "outcomes.jsonl.gz")
    with pytest.raises(InvalidOutcomes, match=r"outcomes\.jsonl\.gz: .*(damaged|cannot be read)"):
        list(read_rows(path))


def test_a_file_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    with pytest.raises(InvalidOutcomes, match=r"none\.jsonl: cannot be read \(No such file or directory\)"):
        list(read_rows(tmp_path / "none.jsonl"))
    with pytest.raises(InvalidOutcomes, match="cannot be read"):
        list(read_rows(tmp_path))


FULL = {"input_cost_per_token": 1e-6, "output_cost_per_token": 3e-6}


def written_prices(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "prices.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_prices_have_litellms_names_and_other_fields_are_ignored(tmp_path: Path) -> None:
    cached = FULL | {"cache_read_input_token_cost": 1e-7, "mode": "chat"}
    free = {"input_cost_per_token": 0, "output_cost_per_token": 0}
    prices = read_prices(written_prices(tmp_path, {"paid": cached, "free": free}))
    assert prices == {"paid": Price(1e-6, 3e-6, 1e-7), "free": Price(0.0, 0.0)}


@pytest.mark.parametrize(
    ("price", "message"),
    [
        ({"output_cost_per_token": 3e-6}, "lacks input_cost_per_token"),
        (FULL | {"output_cost_per_token": None}, "lacks output_cost_per_token"),
        (FULL | {"input_cost_per_token": "1e-6"}, "input_cost_per_token must be a number, USD per token; got '1e-6'"),
        (FULL | {"input_cost_per_token": False}, "got False"),
        (FULL | {"input_cost_per_token": -1e-6}, "got -1e-06"),
        (FULL | {"output_cost_per_token": float("nan")}, "got nan"),
        (FULL | {"output_cost_per_token": 10**30}, "from 0 to 1e+06"),
        (3e-6, "must be an object"),
    ],
)
def test_an_unusable_price_is_refused_with_its_model(tmp_path: Path, price: object, message: str) -> None:
    path = written_prices(tmp_path, {"fine": FULL, "large": price})
    with pytest.raises(InvalidOutcomes, match=rf"prices\.json: the price of 'large'.*{re.escape(message)}"):
        read_prices(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a":\n1 2}', "is not JSON (Expecting ',' delimiter at line 2, column 3)"),
        (b"[]", "must be a JSON object"),
        (b'{"a": {}, "a": {}}', "is not usable JSON ('a' is stated twice: keep one)"),
        (b"\x1f\x8b\x08", "is not UTF-8"),
    ],
)
def test_a_file_without_prices_is_refused_with_its_name(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InvalidOutcomes, match=rf"prices\.json: {re.escape(message)}"):
        read_prices(written_prices(tmp_path, content))
    with pytest.raises(InvalidOutcomes, match=r"none\.json: cannot be read"):
        read_prices(tmp_path / "none.json")
