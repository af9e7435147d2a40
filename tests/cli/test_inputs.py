from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from proxy.cli.console import (
    BadArgument,
    require_distinct,
    require_empty_folder,
    require_readable,
    require_utf8_name,
    require_writable,
)


def test_what_is_in_a_file_stays_until_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("the last one")
    assert require_writable(path, "--html") == path
    assert path.read_text() == "the last one"


def test_a_file_that_is_not_there_is_not_there_before_it_is_written(tmp_path: Path) -> None:
    assert not require_writable(tmp_path / "page.html", "--html").exists()


@pytest.mark.parametrize("check", [require_readable, require_writable])
def test_a_path_that_cannot_be_opened_is_told_with_its_option(
    tmp_path: Path, check: Callable[[Path, str], Path]
) -> None:
    missing = tmp_path / "nowhere" / "file"
    verb = "read" if check is require_readable else "written"
    with pytest.raises(BadArgument, match=rf"^--file: {missing} cannot be {verb} \(No such file or directory\)$"):
        check(missing, "--file")
    with pytest.raises(BadArgument, match=rf"^--file: {tmp_path} cannot be {verb} \(Is a directory\)$"):
        check(tmp_path, "--file")


def test_a_folder_is_made_and_must_be_empty(tmp_path: Path) -> None:
    assert require_empty_folder(tmp_path / "a" / "b", "--out").is_dir()
    with pytest.raises(BadArgument, match=r"--out: .* exists and is not an empty folder"):
        require_empty_folder(tmp_path / "a", "--out")


def test_two_options_may_not_name_one_file_by_any_path(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    files = {"--outcomes": tmp_path / "file", "--prices": None, "--html": tmp_path / "page"}
    require_distinct(files)
    with pytest.raises(BadArgument, match=r"--svg: .*link is the file of --outcomes too"):
        require_distinct({**files, "--svg": tmp_path / "link"})


def test_a_name_of_any_bytes_is_refused_and_any_text_is_taken() -> None:
    assert require_utf8_name(Path("ergebnisse-für-🦊.jsonl"), "--outcomes").suffix == ".jsonl"
    with pytest.raises(BadArgument, match=r"--outcomes: the name of .* is not UTF-8 text"):
        require_utf8_name(Path(os.fsdecode(b"\xff.jsonl")), "--outcomes")
