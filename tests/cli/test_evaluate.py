from __future__ import annotations

import gzip
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from router_core.evaluation.study import METHODS
from router_core.evaluation.trials import DEFAULT_TRIALS
from tests.support.outcome_files import PRICES, SMALL, error_line, json_of, rows, run, write_files
from tests.support.processes import ProcessGroup, process_group
from tests.support.waiting import wait_until

Environ = dict[str, str]


def test_json_has_each_methods_figures_by_labels(environ: Environ, files: tuple[str, ...]) -> None:
    document = json_of(environ, *files, *SMALL)
    assert tuple(document["methods"]) == METHODS
    fields = {f"{name}{end}" for name in ("area", "qnc", "peak") for end in ("", "_low", "_high")}
    for by_labels in document["methods"].values():
        assert list(by_labels) == ["10", "20"]
        assert fields <= by_labels["20"].keys()
        assert by_labels["20"]["area_low"] <= by_labels["20"]["area"] <= by_labels["20"]["area_high"]


def test_ours_is_better_than_the_cheapest_model_and_no_better_than_the_oracle(
    environ: Environ, files: tuple[str, ...]
) -> None:
    methods = json_of(environ, *files, *SMALL)["methods"]
    cheapest, ours, oracle = (methods[name]["20"]["area"] for name in ("cheapest", "ours", "oracle"))
    assert cheapest < ours < oracle


def test_the_same_command_gives_the_same_figures_with_any_number_of_workers(
    environ: Environ, files: tuple[str, ...]
) -> None:
    options = (*files, "--labels", "10", "--trials", "3", "--unseen", "0.5")
    one = json_of(environ, *options, "--workers", "1")
    assert json_of(environ, *options, "--workers", "1") == one
    assert json_of(environ, *options, "--workers", "2") == one
    assert json_of(environ, *options, "--workers", "1", "--seed", "1")["methods"] != one["methods"]


def test_a_table_is_told_and_a_page_and_a_picture_are_written(
    environ: Environ, files: tuple[str, ...], tmp_path: Path
) -> None:
    page, picture = tmp_path / "page.html", tmp_path / "picture.svg"
    ended = run(environ, *files, *SMALL, "--html", page, "--svg", picture)
    assert (ended.returncode, "N = 20" in ended.stdout) == (0, True), ended.stderr
    assert "Routing study: outcomes.jsonl" in page.read_text()
    assert "Deferral curves, 20 labels" in picture.read_text()


def test_what_is_not_said_is_as_usual_for_the_file(environ: Environ, tmp_path: Path) -> None:
    two = ("tiny", "large")
    protocol = json_of(environ, *write_files(tmp_path, rows(80, *two), *two), "--trials", "1")["protocol"]
    assert (protocol["unseen"], protocol["new_models"], protocol["labels"]) == (0.0, 2, [25, 50])
    six = json_of(environ, *write_files(tmp_path, rows()), "--trials", "1", "--unseen", "0.5")["protocol"]
    assert (six["known_models"], six["new_models"], six["labels"]) == (2, 2, [25, 50])
    assert f"by default {DEFAULT_TRIALS}." in run(environ, "--help").stdout


def test_the_configured_embedder_is_taken_unless_another_is_named(
    environ: Environ, files: tuple[str, ...], tmp_path: Path
) -> None:
    elsewhere = {**environ, "UNIROUTE_EMBEDDER": str(tmp_path)}
    assert f"the folder {tmp_path} holds no sentence-transformers model" in error_line(
        run(elsewhere, *files, *SMALL), 2
    )
    assert json_of(elsewhere, *files, *SMALL, "--embedder", "static")["methods"]


def test_zipped_lines_of_windows_are_the_same_lines(environ: Environ, files: tuple[str, ...]) -> None:
    plain = json_of(environ, *files, *SMALL)
    outcomes = Path(files[1])
    outcomes.write_bytes(gzip.compress(b"\xef\xbb\xbf" + outcomes.read_bytes().replace(b"\n", b"\r\n")))
    assert json_of(environ, *files, *SMALL) == plain


def test_odd_prompts_are_studied_as_any(environ: Environ, tmp_path: Path) -> None:
    """Without a token, of a megabyte, with half a character."""
    odd = ["\u200b", "\u200b\u200b", "word " * 200_000, "a lone \ud800 half", "<b>&amp;</b>"]
    lines = [{**line, "prompt": prompt} for line, prompt in zip(rows(len(odd)), odd, strict=True)] + rows()
    assert json_of(environ, *write_files(tmp_path, lines), *SMALL)["protocol"]["prompts"] == 120 + len(odd)


def test_names_of_models_are_told_as_they_are_and_escaped_where_they_must_be(environ: Environ, tmp_path: Path) -> None:
    names = ["</script><script>alert(1)</script>", "new\nline", "🦊" * 250, "$title"]
    renamed = dict(zip(PRICES, names, strict=True))
    lines = [{**row, "scores": {renamed[name]: score for name, score in row["scores"].items()}} for row in rows()]
    files = write_files(tmp_path, lines)
    prices = json.loads(Path(files[3]).read_text())
    Path(files[3]).write_text(json.dumps({renamed[name]: price for name, price in prices.items()}))
    page = tmp_path / "page.html"
    assert json_of(environ, *files, *SMALL, "--html", page)["protocol"]["models"] == sorted(names)
    assert "<script>alert" not in page.read_text()


@pytest.mark.parametrize("score", [0.0, 0.5])
def test_where_no_model_is_better_there_is_no_area_and_that_is_said(
    environ: Environ, tmp_path: Path, score: float
) -> None:
    lines = [{**row, "scores": dict.fromkeys(PRICES, score)} for row in rows()]
    page = tmp_path / "page.html"
    ended = run(environ, *write_files(tmp_path, lines), *SMALL, "--html", page)
    assert ended.returncode == 0, ended.stderr
    for output in (ended.stdout, page.read_text()):
        assert "Area is undefined in 3 of 3 trials: the best new model was the cheapest." in output


def test_models_that_are_all_free_reach_the_best_ones_quality(environ: Environ, tmp_path: Path) -> None:
    files = write_files(tmp_path, rows())
    free = {"input_cost_per_token": 0, "output_cost_per_token": 0}
    Path(files[3]).write_text(json.dumps(dict.fromkeys(PRICES, free)))
    best = json_of(environ, *files, *SMALL)["methods"]["best_single"]["20"]
    assert (best["area"], best["qnc"], best["reached"]) == (None, None, 1.0)


@contextmanager
def begun(environ: Environ, *arguments: str) -> Iterator[ProcessGroup]:
    """Start an evaluation of many trials, with two workers."""
    options = ("--labels", "10", "--trials", "400", "--workers", "2")
    with process_group([sys.executable, "-m", "proxy.cli", "evaluate", *arguments, *options], environ) as group:
        while "trials: 0/400" not in (line := group.stderr.readline()):
            assert line, "it ended"
        yield group


def test_ctrl_c_ends_the_command_and_its_workers_without_a_word(environ: Environ, files: tuple[str, ...]) -> None:
    with begun(environ, *files) as group:
        group.interrupt()
        assert group.end() == ("", "", 130)


def test_a_worker_that_was_killed_is_told_in_one_line(environ: Environ, files: tuple[str, ...]) -> None:
    with begun(environ, *files) as group:
        assert wait_until(lambda: len(group.workers()) > 1)
        os.kill(group.workers()[-1], signal.SIGKILL)
        _, complained, status = group.end()
    assert (status, complained.splitlines()[-1]) == (
        1,
        "uniroute: a worker process was killed, as when memory runs out; give fewer workers",
    )
