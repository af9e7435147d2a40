from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from router_core.evaluation.study import METHODS
from tests.support.outcome_files import SMALL, error_line, rows, run, write_files

Environ = dict[str, str]
Spoil = Callable[[Path], object]


def spoilt(field: str, value: object) -> Spoil:
    """Change the fourth line."""

    def spoil(outcomes: Path) -> None:
        lines = outcomes.read_text().splitlines()
        lines[3] = json.dumps({**json.loads(lines[3]), field: value})
        outcomes.write_text("\n".join(lines))

    return spoil


def scored(model: str, value: object) -> Spoil:
    return spoilt("scores", {"tiny": 1.0, model: value})


def text(content: str) -> Spoil:
    return lambda outcomes: outcomes.write_text(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (scored("large", 1.5), r"outcomes\.jsonl, line 4: scores\['large'\] must be a number from 0 to 1; got 1\.5"),
        (scored("large", 1e308), r"line 4: scores\['large'\].* got 1e\+308; scale it"),
        (scored("large", float("nan")), r"line 4: scores\['large'\].* got nan; .* leave out who was not asked"),
        (scored("larg", 1), r"line 4: 'larg' is scored but has no price; add it .* \(did you mean 'large'\?\)"),
        (scored("\ud800", 1), r"line 4: scores names '\\ud800', a lone surrogate"),
        (spoilt("prompt", " \n"), r"line 4: needs \"prompt\", a text that is not empty; got ' \\n'"),
        (text("hello\n"), r"outcomes\.jsonl, line 1: is not JSON"),
        (text(""), r"outcomes\.jsonl: there is no prompt in it; write one JSON object a line"),
        (text('{"prompt": "p", "scores": {"tiny": 1}}\n'), r"'tiny' is the only model scored; .* two models or more"),
        (lambda outcomes: outcomes.write_bytes(gzip.compress(outcomes.read_bytes())[:-9]), r"is cut off or damaged"),
    ],
)
def test_outcomes_that_cannot_be_used_are_told_by_line(
    environ: Environ, files: tuple[str, ...], spoil: Spoil, message: str
) -> None:
    spoil(Path(files[1]))
    assert re.search(message, error_line(run(environ, *files, *SMALL), 1))


@pytest.mark.parametrize(
    ("prices", "message"),
    [
        ({"tiny": {"input_cost_per_token": 1e-6, "output_cost_per_token": 0}}, r"line 1: 'small' is scored but has no"),
        ({"tiny": {"input_cost_per_token": 1e-6}}, r"price of 'tiny' lacks output_cost_per_token: add it"),
        ([1], r"prices\.json: must be a JSON object; got \[1\]"),
    ],
)
def test_prices_that_cannot_be_used_are_told_by_model(
    environ: Environ, files: tuple[str, ...], prices: object, message: str
) -> None:
    Path(files[3]).write_text(json.dumps(prices))
    assert re.search(message, error_line(run(environ, *files, *SMALL), 1))


def test_a_model_that_is_priced_and_never_scored_is_named(environ: Environ, tmp_path: Path) -> None:
    two = ("tiny", "large")
    files = write_files(tmp_path, rows(80, *two), *two, "middle")
    assert "'middle' is priced but no line of" in error_line(run(environ, *files), 1)


def test_models_that_share_no_prompt_are_told_before_any_trial(environ: Environ, tmp_path: Path) -> None:
    lines = rows()
    for line in lines[1:]:
        del line["scores"]["tiny"]
    ended = run(environ, *write_files(tmp_path, lines), *SMALL)
    assert "leave out 'tiny', which is scored on 1 of 120 prompts only" in error_line(ended, 1)
    assert "trials:" not in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--labels", "a"), 2, r"--labels: 'a' is not whole numbers from 1 with commas, as 25,50,100"),
        (("--labels", "0"), 2, r"--labels: '0' is not whole numbers from 1"),
        (("--labels", "85"), 1, r"85 labels are more than the 84 prompts .* of 120 that differ: give smaller --labels"),
        (("--unseen", "0.33"), 1, r"unseen=0\.33 of 4 models leaves 1 new one, .* give --unseen 0"),
        (("--unseen", "2"), 2, r"'--unseen'"),
        (("--trials", "0"), 2, r"'--trials'"),
        (("--html", "/nowhere/page.html"), 2, r"--html: /nowhere/page\.html cannot be written \(No such file"),
        (("--svg", "/"), 2, r"--svg: / cannot be written \(Is a directory\)"),
        (("--deployed",), 2, r"--prices is for trials; --deployed takes what is deployed"),
        (("--config", "/nowhere.yaml"), 2, r"/nowhere\.yaml: cannot be read"),
        (("--outcomes", "/nowhere.jsonl"), 2, r"--outcomes: /nowhere\.jsonl cannot be read \(No such file"),
        (("--prices", "/nowhere.json"), 2, r"--prices: /nowhere\.json cannot be read \(No such file"),
    ],
)
def test_an_option_that_cannot_be_followed_is_told_before_the_work(
    environ: Environ, files: tuple[str, ...], arguments: tuple[str, ...], status: int, message: str
) -> None:
    ended = run(environ, *files, *arguments)
    assert re.search(message, error_line(ended, status))
    assert "embedding:" not in ended.stderr


def test_trials_need_prices(environ: Environ, files: tuple[str, ...]) -> None:
    assert "--prices: give the prices of the models" in error_line(run(environ, *files[:2]), 2)


@pytest.mark.parametrize("option", ["--labels", "--trials", "--seed", "--unseen", "--embedder", "--workers"])
def test_what_is_for_trials_is_refused_with_deployed(environ: Environ, files: tuple[str, ...], option: str) -> None:
    assert f"{option} is for trials" in error_line(run(environ, *files[:2], "--deployed", option, "1"), 2)


def test_no_file_that_is_read_is_written_over(environ: Environ, files: tuple[str, ...]) -> None:
    ended = run(environ, *files, *SMALL, "--html", files[1])
    assert "is the file of --outcomes too; give another" in error_line(ended, 2)
    assert Path(files[1]).read_text().startswith('{"prompt"')


def test_a_name_that_cannot_be_told_is_refused(environ: Environ, files: tuple[str, ...]) -> None:
    odd = Path(files[1]).rename(os.fsdecode(os.fsencode(files[1]) + b"\xff"))
    assert "is not UTF-8 text; rename the file" in error_line(run(environ, "--outcomes", odd, *files[2:]), 2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
@pytest.mark.parametrize("option", ["--html", "--svg"])
def test_a_full_disk_is_told_in_one_line_after_the_figures(
    environ: Environ, files: tuple[str, ...], option: str
) -> None:
    ended = run(environ, *files, *SMALL, option, "/dev/full", "--json")
    assert (ended.returncode, len(json.loads(ended.stdout)["methods"])) == (1, len(METHODS))
    assert ended.stderr.splitlines()[-1] == f"uniroute: {option}: /dev/full cannot be written (No space left on device)"
