from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxy.cli.console import BadArgument, check_prompt_files, read_prompts
from proxy.cli.fit_backend import outcome_models, with_progress
from proxy.routing.requirements import routing_text
from router_core.text import MAX_END_CHARS, truncate_middle
from tests.bench.prompts import generated_prompts
from tests.support.command import environment, run_command


def write_parquet(path: Path, **columns: Any) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), path, row_group_size=2)
    return path


def write_jsonl(path: Path, prompts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def fitted(*arguments: str | Path, environ: dict[str, str]) -> dict[str, Any]:
    ended = run_command("fit", *arguments, "--json", environ=environ, timeout_s=170)
    assert ended.returncode == 0, ended.stderr
    document: dict[str, Any] = json.loads(ended.stdout)
    return document


def write_outcomes(path: Path, prompts: Iterable[str]) -> Path:
    """Write outcomes of three models, each right where the prompt has its letter."""
    rows = [{"prompt": prompt, "scores": {m: float(m in prompt) for m in "aeo"}} for prompt in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_scores_are_found_by_prompt_and_repeats_count_as_their_mean(tmp_path: Path) -> None:
    rows = [
        {"prompt": "one", "scores": {"x": 1.0}},
        {"prompt": "one", "scores": {"x": 0.0, "y": 1.0}},
        {"prompt": "elsewhere", "scores": {"y": 0.0}},
        {"prompt": "l" * 9_000, "scores": {"y": 0.25}},
    ]
    path = tmp_path / "outcomes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = outcome_models(path, ["two", truncate_middle("l" * 9_000), "one"])
    assert known.models == ("x", "y")
    assert np.array_equal(known.scores, [[np.nan, np.nan], [np.nan, 0.25], [0.5, 1.0]], equal_nan=True)
    assert outcome_models(None, ["two"]).scores.shape == (1, 0)


def test_a_map_fitted_with_outcomes_remembers_the_models(tmp_path: Path, embedder_cache: Path) -> None:
    environ = environment(tmp_path / "data", embedder_cache)
    outcomes = write_outcomes(tmp_path / "outcomes.jsonl", generated_prompts(700))
    alone = fitted("--outcomes", outcomes, "--clusters", "8", "--out", tmp_path / "alone", environ=environ)
    assert (alone["known_models"], alone["clusters"]) == (["a", "e", "o"], 8 + alone["taught_clusters"])
    assert alone["taught_clusters"] > 0
    more = write_jsonl(tmp_path / "more.jsonl", ["a prompt of another kind", "and one more"])
    both = fitted(more, "--outcomes", outcomes, "--clusters", "8", "--out", tmp_path / "both", environ=environ)
    assert both["sampled"] == alone["sampled"] + 2


def test_nothing_to_fit_to_is_refused(tmp_path: Path, embedder_cache: Path) -> None:
    ended = run_command("fit", "--out", tmp_path / "map", environ=environment(tmp_path))
    assert ended.returncode == 2
    assert "--outcomes" in ended.stderr


def test_parquet_gives_the_prompts_of_its_rows(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", prompt=["one", "two", "three"], other=[1, 2, 3])
    assert list(read_prompts([path])) == ["one", "two", "three"]


def test_parquet_gives_the_user_turns_of_its_messages(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "no"}, {"role": "user", "content": "yes"}, {"role": "user", "content": "!"}]
    path = write_parquet(tmp_path / "a.parquet", messages=[turns])
    assert list(read_prompts([path])) == ["yes\n!"]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"prompt": ["one", "two", None]}, "a.parquet, row 3: needs"),
        ({"prompt": [1, 2]}, "a.parquet, row 1: needs"),
        ({"text": ["one"], "id": ["1"]}, "it has text, id"),
    ],
)
def test_a_parquet_file_that_cannot_be_used_is_told_by_row_or_column(
    tmp_path: Path, columns: dict[str, Any], words: str
) -> None:
    path = write_parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(BadArgument, match=words):
        list(read_prompts([path]))


def test_what_is_no_parquet_file_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("one\ntwo\n")
    with pytest.raises(BadArgument, match="not a Parquet file"):
        list(read_prompts([tmp_path / "a.parquet"]))


def test_without_pyarrow_the_extra_is_named_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.touch()
    code = f"""if True:
        import sys
        sys.modules["pyarrow"] = None
        from pathlib import Path
        from proxy.cli.console import check_prompt_files
        check_prompt_files([Path({str(path)!r})])"""
    ended = subprocess.run([sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True)
    assert "pip install 'uniroute[parquet]'" in ended.stderr.splitlines()[-1]


def test_a_later_file_that_is_missing_is_told_before_the_first_is_read(tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match=r"nowhere\.txt"):
        check_prompt_files([write_jsonl(tmp_path / "a.jsonl", ["one"]), tmp_path / "nowhere.txt"])


def test_a_gzip_file_that_is_cut_off_is_told_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress("\n".join(generated_prompts(100)).encode())[:-20])
    with pytest.raises(BadArgument, match=r"a\.txt\.gz: its compressed data is broken"):
        list(read_prompts([path]))


def test_a_long_prompt_is_fitted_as_it_is_routed(tmp_path: Path) -> None:
    long = "a" * MAX_END_CHARS + "b" * MAX_END_CHARS + "c" * MAX_END_CHARS
    assert list(read_prompts([write_jsonl(tmp_path / "a.jsonl", [long, "  short "])])) == [
        routing_text([{"role": "user", "content": long}]),
        "  short ",
    ]


class Remembering:
    def __init__(self) -> None:
        self.updates: list[tuple[str, int, int, str]] = []

    def update(self, label: str, done: int, total: int, remark: str = "") -> None:
        self.updates.append((label, done, total, remark))


def test_reading_tells_how_many_and_how_fast_and_in_the_end_that_it_is_complete() -> None:
    bars = Remembering()
    assert sum(1 for _ in with_progress(("x" for _ in range(25_000)), "reading", bars)) == 25_000
    assert [update[:3] for update in bars.updates] == [
        ("reading", 10_000, 0),
        ("reading", 20_000, 0),
        ("reading", 25_000, 25_000),
    ]
    assert all(update[3].endswith("/s") for update in bars.updates)


def test_files_of_all_kinds_make_the_map_that_one_file_of_them_makes(tmp_path: Path, embedder_cache: Path) -> None:
    environ = environment(tmp_path / "data", embedder_cache)
    prompts = list(generated_prompts(300))
    files = [
        write_jsonl(tmp_path / "a.jsonl", prompts[:100]),
        write_parquet(tmp_path / "b.parquet", prompt=prompts[100:200]),
        write_jsonl(tmp_path / "c.jsonl", [*prompts[200:], prompts[0]]),
    ]
    several = fitted(*files, "--clusters", "8", "--count", "--out", tmp_path / "several", environ=environ)
    single = write_jsonl(tmp_path / "all.jsonl", prompts)
    one = fitted(single, "--clusters", "8", "--out", tmp_path / "one", environ=environ)
    assert several["map"] == one["map"]
    assert (several["prompts"], several["sampled"], sum(several["counts"])) == (301, 300, 301)
    assert len(several["counts"]) == 8


def test_workers_are_for_ray_only(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one"])
    ended = run_command("fit", path, "--workers", "2", "--out", tmp_path / "map", environ=environment(tmp_path))
    assert (ended.returncode, "--workers is for --ray" in ended.stderr) == (2, True)


@pytest.mark.slow  # needs Ray
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere"])
def test_a_ray_that_is_not_there_is_told_at_once(tmp_path: Path, address: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one"])
    arguments = ("fit", path, "--ray", address, "--out", tmp_path / "map")
    ended = run_command(*arguments, environ=environment(tmp_path), timeout_s=60)
    assert (ended.returncode, f"--ray {address}: " in ended.stderr) == (2, True)


@pytest.mark.slow  # a Ray of two workers is started
@pytest.mark.timeout(360)
def test_two_ray_workers_fit_the_map_that_one_process_fits(tmp_path: Path, embedder_cache: Path) -> None:
    environ = environment(tmp_path / "data", embedder_cache)
    prompts = [*generated_prompts(20_000), "a lone surrogate \ud800", "word " * 3_000]
    files = [write_jsonl(tmp_path / f"{n}.jsonl", prompts[n::3]) for n in range(3)]
    same: tuple[str | Path, ...] = (*files, files[0], "--clusters", "16", "--seed", "5", "--count")
    one = fitted(*same, "--out", tmp_path / "one", environ=environ)
    two = fitted(*same, "--ray", "local", "--workers", "2", "--out", tmp_path / "two", environ=environ)
    del one["folder"], two["folder"]
    assert one == two
    assert (one["prompts"] > 20_000, one["sampled"]) == (True, 16_384)


@pytest.mark.slow  # a Ray is started
def test_a_broken_line_is_named_by_a_ray_worker_too(tmp_path: Path) -> None:
    prompts = tmp_path / "a.jsonl"
    prompts.write_text('{"prompt": "one"}\n{"text": "two"}\n')
    arguments = ("fit", prompts, "--ray", "local", "--workers", "1", "--out", tmp_path / "map")
    ended = run_command(*arguments, environ=environment(tmp_path), timeout_s=170)
    assert (ended.returncode, "a.jsonl, line 2: needs" in ended.stderr) == (2, True)
    assert "Traceback" not in ended.stderr
