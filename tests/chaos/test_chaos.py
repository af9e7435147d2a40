from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from tests.chaos.report import print_report
from tests.chaos.run import chaos

SECONDS = 300.0
# For everything to start, to settle and to end on a machine that has much else to do.
STARTING_S = 240.0
PER_SECOND = 25.0
SEED = 7

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it finds the workers and their connections in /proc")


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + STARTING_S)
def test_every_request_of_five_minutes_is_accounted_for_exactly_once(tmp_path: Path, embedder_cache: Path) -> None:
    run = asyncio.run(chaos(tmp_path, embedder_cache, SEED, SECONDS, PER_SECOND))
    print_report(run)  # shown where it fails, and with -rP
    assert list(run.problems) == []
