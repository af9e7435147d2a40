"""The course of a model's profiles on its page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from proxy.dashboard.pictures import history_chart
from proxy.storage.profile_history import MAX_PROFILES
from router_core.artifact import builtin_map
from tests.dashboard.site import Site
from tests.dashboard.test_answers import Markup
from tests.dashboard.test_views import text_of
from tests.support.proxy_process import model_entry, uniform_profile

NAME = "with/history"


@pytest.fixture
def model(site: Site) -> Iterator[str]:
    body = {**model_entry(NAME, site.upstream.url), "profile": uniform_profile(0.2)}
    assert site.proxy.admin("POST", "/admin/models", body).status_code == 201
    yield NAME
    site.proxy.admin("DELETE", f"/admin/models/{NAME}")


def page_of(site: Site) -> str:
    with site.visitor() as visitor:
        return visitor.get("/model?name=with%2Fhistory").text


def row(error: float, **more: Any) -> dict[str, Any]:
    shown = {"stored_at": "2026-11-20T10:00:00Z", "total_labels": 60.0, "change": None}
    return {**shown, "mean_error": error, "error_low": error - 0.05, "error_high": error + 0.05, **more}


def test_one_profile_is_a_row_and_two_are_a_picture_with_the_change_between_them(site: Site, model: str) -> None:
    alone = page_of(site)
    worse = uniform_profile(0.2)
    worse["errors"][7] = 0.9
    site.proxy.put_profile(model, 0.4)
    site.proxy.admin("POST", f"/admin/models/{model}/profile", worse)
    page = page_of(site)
    text = text_of(page)

    assert "history-readout" not in alone
    assert "handed over 0.20" in text_of(alone)
    assert page.count('class="dot mark"') == 3
    assert re.search(
        r'class="dot mark" role="img" tabindex="0"[^>]*>\s*<title>[^<]*; differs from the one before', page
    )
    assert "two-proportion z-test, two-sided, p below 0.001" in text
    assert re.search(r"−0\.189, differs [\d.e-]+", text)
    assert re.search(r"\+0\.200, differs [\d.e-]+", text)
    assert f"{builtin_map().names[7]} +0.4" in text
    assert (Markup(page).inline, Markup(page).foreign) == ([], [])
    assert len(Markup(page).ids) == len(set(Markup(page).ids))


def test_a_model_without_profiles_says_so(site: Site) -> None:
    body = {**model_entry(NAME, site.upstream.url, mode="embedding")}
    assert site.proxy.admin("POST", "/admin/models", body).status_code == 201
    try:
        assert "No profile is kept yet" in text_of(page_of(site))
    finally:
        site.proxy.admin("DELETE", f"/admin/models/{NAME}")


def test_the_picture_goes_from_left_to_right_and_holds_every_bound() -> None:
    rows = [row(0.1 + 0.03 * place) for place in range(MAX_PROFILES)]
    chart = history_chart(rows)

    assert chart is not None
    assert [mark.x for mark in chart.marks] == sorted(mark.x for mark in chart.marks)
    assert chart.marks[0].y < chart.marks[-1].y  # the oldest, which is the last row, has the largest error
    for mark in chart.marks:
        assert chart.top <= mark.height < mark.y < mark.label_y <= chart.floor
        assert chart.left < mark.x < chart.right
    assert len(chart.x_ticks) <= 7
    assert (chart.y_ticks[0].at, chart.y_ticks[0].text) == (chart.floor, "0.0")
    assert history_chart(rows[:1]) is None
