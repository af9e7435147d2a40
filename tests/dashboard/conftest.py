from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dashboard.site import Site, open_site


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Site]:
    with open_site(tmp_path_factory.mktemp("dashboard"), embedder_cache) as opened:
        yield opened
