from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.command import environment
from tests.support.outcome_files import rows, write_files


@pytest.fixture
def environ(tmp_path: Path, embedder_cache: Path) -> dict[str, str]:
    return environment(tmp_path / "data", embedder_cache)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, ...]:
    return write_files(tmp_path, rows())
