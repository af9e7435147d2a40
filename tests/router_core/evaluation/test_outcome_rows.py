"""One line of an outcomes file: what is read, and what each mistake is told."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from router_core.errors import InvalidOutcomes
from router_core.evaluation import outcomes as outcome_rows
from router_core.evaluation.outcomes import parse_row, read_rows

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
    ("broken", "told"),
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
def test_an_unusable_row_is_refused_with_its_line_and_value(broken: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidOutcomes, match=rf"^line 7: .*{re.escape(told)}"):
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
    ("second", "told"),
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
def test_a_line_that_is_no_json_object_is_named(tmp_path: Path, second: bytes, told: str) -> None:
    path = written(tmp_path, LINE + b"\n" + second)
    with pytest.raises(InvalidOutcomes, match=rf"^{re.escape(str(path))}, line 2: {told}"):
        list(read_rows(path))


def test_an_endless_line_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome_rows, "MAX_LINE_BYTES", len(LINE))
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
