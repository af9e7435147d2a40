from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
_NAMED = re.compile(r"`([\w/]+\.py|tests/\w+)`")


def test_every_promise_names_tests_that_exist() -> None:
    rows = [line for line in (ROOT / "SECURITY.md").read_text("utf-8").splitlines() if line.startswith("| **")]
    assert len(rows) > 10
    for row in rows:
        named = [Path(name) for name in _NAMED.findall(row.rpartition("| ")[0] + row.rpartition("| ")[2])]
        folder = Path()
        assert named, row
        for path in named:  # a bare name lies beside the one before it
            folder = path.parent if path.parent != Path() else folder
            assert (ROOT / (path if path.parent != Path() else folder / path)).exists(), f"{path} of {row[:60]}"
