"""Mixed traffic over two workers while everything around them breaks: every request is accounted for exactly once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.chaos.report import print_report
from tests.chaos.run import chaos

SECONDS = 300.0
PER_SECOND = 25.0


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
def test_every_request_of_a_chaos_run_is_accounted_for_exactly_once(tmp_path: Path, embedder_cache: Path) -> None:
    run = asyncio.run(chaos(tmp_path, embedder_cache, seed=7, seconds=SECONDS, per_second=PER_SECOND))

    print_report(run)  # shown where it fails, and with -rP
    assert list(run.problems) == []
