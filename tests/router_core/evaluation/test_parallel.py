from __future__ import annotations

import os
import signal
import sys

import pytest

from router_core.errors import InvalidInput, WorkerLost
from router_core.evaluation.parallel import parallel_map
from router_core.evaluation.study import METHODS, run_study
from tests.router_core.evaluation.toys import a_plan, two_kinds, vectors_of
from tests.router_core.evaluation.work import heeds_interrupts, leave, refuse_three, stay_stuck, threads
from tests.support.processes import process_group


def test_each_item_runs_in_one_thread_and_the_limits_are_restored() -> None:
    before = threads(0)
    assert list(parallel_map(threads, [0, 1], 1)) == [(1, 1), (1, 1)]
    assert threads(0) == before


@pytest.mark.parametrize("workers", [1, 2])
def test_a_workers_exception_is_raised_after_earlier_results(workers: int) -> None:
    found = parallel_map(refuse_three, range(5), workers)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InvalidInput, match="3 is not wanted"):
        next(found)


def test_results_do_not_depend_on_the_number_of_processes() -> None:
    outcomes = two_kinds()
    progress: list[tuple[str, int, int]] = []
    one, two = (
        run_study(
            outcomes, vectors_of(outcomes), a_plan(labels=(20,)), lambda *step: progress.append(step), workers=workers
        )
        for workers in (1, 2)
    )
    assert [one.methods[method][20].area for method in METHODS] == [two.methods[method][20].area for method in METHODS]
    assert progress[: len(progress) // 2] == progress[len(progress) // 2 :]


def test_a_killed_worker_is_reported() -> None:
    with pytest.raises(WorkerLost, match="give fewer workers"):
        list(parallel_map(leave, range(3), 2))


STUCK = [sys.executable, "-c", f"from {stay_stuck.__module__} import stay_stuck; stay_stuck()"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent_however_it_ends(how: signal.Signals) -> None:
    with process_group(STUCK) as group:
        assert len({group.stdout.readline() for _ in range(2)}) == 2
        os.kill(group.pid, how)
        output, _, status = group.end()
    assert (output, status) == ("", -how)


def test_workers_do_not_receive_the_terminals_ctrl_c() -> None:
    assert list(parallel_map(heeds_interrupts, range(4), 2)) == [False] * 4
    assert heeds_interrupts(0)
