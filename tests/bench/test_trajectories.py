from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.trajectories import WORLDS, World, in_process, lines, replay

RUNS, LAMBDA = 40, 0.3


@pytest.mark.parametrize("name", WORLDS)
async def test_the_term_costs_no_solved_run_and_breaks_no_loop(name: str, tmp_path: Path) -> None:
    world = World(name, seed=1)
    without, found = [await replay(world, in_process(world, weight, LAMBDA, tmp_path), RUNS) for weight in (0.0, 0.75)]

    assert sum(each.solved for each in found) >= sum(each.solved for each in without)
    assert sum(each.breaks for each in (*found, *without)) == 0
    assert len(list(lines({0.0: without, 0.75: found}))) == 3
