"""Results for the report: those of a study of toys, and by hand what such a study rarely has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from router_core.evaluation.curves import BUDGETS, Curve, Difference
from router_core.evaluation.study import Estimate, MethodMetrics, Results, run_study
from tests.router_core.evaluation.toys import a_plan, two_kinds, vectors_of

NAN = float("nan")
NOWHERE, NOTHING = Estimate(NAN, NAN, NAN, 0), Difference(NAN, NAN, NAN)


@pytest.fixture(scope="session")
def studied() -> Results:
    outcomes = two_kinds(60)
    return run_study(outcomes, vectors_of(outcomes), a_plan(labels=(10, 20, 40), trials=3))


@pytest.fixture
def partly(studied: Results) -> Results:
    """Return results whose area is defined in two of the three trials."""

    def less(figures: MethodMetrics) -> MethodMetrics:
        return replace(figures, area=replace(figures.area, trials=2))

    return replace(studied, methods={name: {n: less(each) for n, each in by.items()} for name, by in _methods(studied)})


@pytest.fixture
def undefined(studied: Results) -> Results:
    """Return results without an area: the best model was the cheapest in every trial."""

    def nothing(figures: MethodMetrics) -> MethodMetrics:
        nowhere = Curve(np.full(BUDGETS, NAN), np.full(BUDGETS, NAN))
        return replace(figures, area=NOWHERE, qnc=NOWHERE, reached=0.0, cost_save=NOWHERE, curve=nowhere)

    return replace(
        studied,
        methods={name: {n: nothing(each) for n, each in by.items()} for name, by in _methods(studied)},
        differences={name: dict.fromkeys(by, NOTHING) for name, by in studied.differences.items()},
        chosen=dict.fromkeys(studied.chosen, NOWHERE),
        chosen_differences=dict.fromkeys(studied.chosen, NOTHING),
    )


@pytest.fixture
def deployed(studied: Results) -> Results:
    """Return what `evaluate_deployed` makes: one N, fewer methods, nothing chosen."""
    kept = ("cheapest", "best_single", "random_mix", "ours", "oracle")
    return replace(
        studied,
        protocol=replace(studied.protocol, labels=(40,), trials=500),
        methods={name: {40: studied.methods[name][40]} for name in kept},
        differences={name: {40: studied.differences[name][40]} for name in kept if name != "ours"},
        chosen={},
        chosen_differences={},
    )


@pytest.fixture
def named_badly(studied: Results) -> Results:
    """Return results whose names try to run a script in the reader's browser."""
    heat_map = studied.heat_map
    clusters = ("</script><script>alert(2)</script>", *heat_map.clusters[1:])
    return replace(
        studied,
        protocol=replace(studied.protocol, outcomes="<img src=x onerror=alert(3)>.jsonl"),
        heat_map=replace(heat_map, models=("<script>alert(1)</script>", *heat_map.models[1:]), clusters=clusters),
    )


def _methods(results: Results) -> list[tuple[str, dict[int, MethodMetrics]]]:
    return [(name, dict(by_labels)) for name, by_labels in results.methods.items()]
