"""Limit the files that one chat request enters: a reader should not have to open more."""

from __future__ import annotations

from pathlib import Path

from tests.bench.code_figures import requests_walked

# Two more than were seen: some are entered only now and then, and without compiled kernels one more.
MAX_FILES = {"named model": 45, "routed": 54, "routed stream": 56, "routed stream, limited key": 61}


def test_a_chat_request_enters_few_files(embedder_cache: Path) -> None:
    found = {kind: walk.files for kind, walk in requests_walked(embedder_cache).items()}

    assert set(found) == set(MAX_FILES)
    assert {kind: files for kind, files in found.items() if len(files) > MAX_FILES[kind]} == {}
