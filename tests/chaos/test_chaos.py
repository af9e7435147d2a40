"""Mixed traffic over two workers while everything around them breaks: every request is accounted for exactly once."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from tests.chaos.report import print_report
from tests.chaos.run import chaos

SECONDS, SHORT_S = 300.0, 20.0
STARTING_S = 240.0
"""For everything to start, to settle and to end on a machine that has much else to do."""
PER_SECOND = 25.0
SEED = 7

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it finds the workers and their connections in /proc")


def accounted_for(folder: Path, embedder_cache: Path, seconds: float) -> None:
    run = asyncio.run(chaos(folder, embedder_cache, SEED, seconds, PER_SECOND))
    print_report(run)  # shown where it fails, and with -rP
    assert list(run.problems) == []


@pytest.mark.timeout(SHORT_S + STARTING_S)
def test_every_request_is_accounted_for_exactly_once(tmp_path: Path, embedder_cache: Path) -> None:
    accounted_for(tmp_path, embedder_cache, SHORT_S)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + STARTING_S)
def test_every_request_of_five_minutes_is_accounted_for_exactly_once(tmp_path: Path, embedder_cache: Path) -> None:
    accounted_for(tmp_path, embedder_cache, SECONDS)
