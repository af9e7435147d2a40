"""A simulated day, smaller than that of `python -m tests.bench.day`: what is told of a model that becomes worse."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest

from router_core.pricing import PICO
from tests.bench.day import MINUTES, NOON, Day, Plan, lines, requests_of, simulate
from tests.bench.day_models import WORSE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="libfaketime is loaded as Linux loads libraries"),
    pytest.mark.skipif(find_spec("libfaketime") is None, reason="libfaketime comes with the extra `clock`"),
]

PLAN = Plan(requests=3000, feedback=0.25, drop=0.5, seed=1)


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory, embedder_cache: object) -> Day:
    return simulate(tmp_path_factory.mktemp("day"), PLAN)


def test_the_model_that_became_worse_is_flagged_within_hours_and_no_other(day: Day) -> None:
    look = day.first_flag()

    assert look is not None
    assert NOON < look.minute < NOON + 6 * 60
    assert look.flagged[WORSE]["change"]["worse"] is True
    assert day.false_alarms() == []
    assert f"{WORSE} became worse" in day.page


def test_the_report_has_every_request_and_every_cent_of_the_ledger(day: Day) -> None:
    total, measuring = day.report["total"], day.report["spending"]["profiling"]["usd"]

    assert total["requests"] == PLAN.requests == len(day.answers)
    assert round(total["cost_usd"] * PICO) == day.ledger_picousd
    assert measuring * PICO == pytest.approx(day.profiling_picousd, abs=10)
    assert total["net_saved_usd"] == pytest.approx(total["saved_usd"] - measuring)


def test_the_reports_bounds_hold_what_was_true_before_the_change_and_feedback_what_is_true_since(day: Day) -> None:
    total = day.report["total"]
    morning, whole = ([not each.right for each in day.answers if each.minute < until] for until in (NOON, MINUTES))

    assert total["expected_error_low"] < sum(morning) / len(morning) < total["expected_error_high"]
    assert total["observed_error_low"] - 0.01 < sum(whole) / len(whole) < total["observed_error_high"] + 0.01
    assert total["observed_error"] > total["scored_expected"]


def test_what_the_program_prints_is_whole(day: Day) -> None:
    printed = "\n".join(lines(day))
    assert "false alarms: none" in printed
    assert f"{WORSE} became worse at noon, and is flagged at" in printed


def test_the_requests_of_a_day_come_in_waves_and_are_all_there() -> None:
    minutes = requests_of(Plan(requests=20_000))
    assert (len(minutes), abs(sum(minutes) - 20_000) <= 1) == (MINUTES, True)
    assert sum(minutes[14 * 60 : 16 * 60]) > 3 * sum(minutes[2 * 60 : 4 * 60])
