"""Limit the files that one chat request enters: a reader should not have to open more."""

from __future__ import annotations

from pathlib import Path

from tests.bench.code_figures import requests_walked

# Without compiled kernels; with them a routed request enters one less.
MAX_FILES = {"named model": 42, "routed": 52, "routed stream": 54, "routed stream, limited key": 59}


def test_a_chat_request_enters_few_files(embedder_cache: Path) -> None:
    found = {kind: walk.files for kind, walk in requests_walked(embedder_cache).items()}

    assert set(found) == set(MAX_FILES)
    assert {kind: files for kind, files in found.items() if len(files) > MAX_FILES[kind]} == {}
