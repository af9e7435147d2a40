"""Work over several processes: in order, one thread each, and the figures of one process alone."""

from __future__ import annotations

import faiss
import pytest
from threadpoolctl import threadpool_info

from router_core.errors import InvalidInput
from router_core.evaluation.spreading import spread
from router_core.evaluation.study import METHODS, run_study
from tests.router_core.evaluation.toys import a_plan, two_kinds, vectors_of


def threads(_item: int) -> tuple[int, int]:
    return int(faiss.omp_get_max_threads()), max(library["num_threads"] for library in threadpool_info())


def refuse_three(item: int) -> int:
    if item == 3:
        raise InvalidInput("3 is not wanted")
    return item


def test_each_piece_of_work_has_one_thread_and_leaves_the_others_as_they_were() -> None:
    before = threads(0)
    assert list(spread(threads, [0, 1], 1)) == [(1, 1), (1, 1)]
    assert threads(0) == before


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_worker_raises_is_raised_after_what_came_before(workers: int) -> None:
    found = spread(refuse_three, range(5), workers)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InvalidInput, match="3 is not wanted"):
        next(found)


def test_figures_do_not_depend_on_how_many_processes_found_them() -> None:
    outcomes = two_kinds()
    told: list[tuple[str, int, int]] = []
    one, two = (
        run_study(
            outcomes, vectors_of(outcomes), a_plan(labels=(20,)), lambda *step: told.append(step), workers=workers
        )
        for workers in (1, 2)
    )
    assert [one.methods[method][20].area for method in METHODS] == [two.methods[method][20].area for method in METHODS]
    assert told[: len(told) // 2] == told[len(told) // 2 :]
