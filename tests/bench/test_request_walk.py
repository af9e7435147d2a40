"""How many files one chat request enters: whoever follows it should not have to open more."""

from __future__ import annotations

from pathlib import Path

from tests.bench.request_walk import walks

MAX_FILES = {"named model": 48, "routed": 48, "routed stream": 53, "routed stream, limited key": 53}


async def test_a_chat_request_enters_few_files(tmp_path: Path, embedder_cache: Path) -> None:
    for table in embedder_cache.glob("static-*"):
        (tmp_path / table.name).symlink_to(table)
    found = {kind: walk.files for kind, walk in (await walks(tmp_path)).items()}

    assert set(found) == set(MAX_FILES)
    assert {kind: files for kind, files in found.items() if len(files) > MAX_FILES[kind]} == {}
