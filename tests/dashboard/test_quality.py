from __future__ import annotations

import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from router_core.artifact import builtin_map
from tests.dashboard.site import Site, open_site
from tests.dashboard.test_views import text_of
from tests.support.proxy_process import ADMIN_KEY
from tests.support.waiting import wait_until

BEST = {"uniroute": {"lambda": 0.0}}
QUIET, WORSE = [(20, 3, 3.0)] * 9, [(20, 11, 3.0)] * 2


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Site]:
    """A site of which one model became worse two hours ago, one is as measured, and others have no feedback."""
    with open_site(tmp_path_factory.mktemp("quality"), embedder_cache) as site:
        site.ask("What is 2 + 2?", score=1.0, **BEST)
        site.ask("What is 2 + 2?", score=0.0, uniroute={"lambda": 5.0})
        site.remember("large", *QUIET, *WORSE)
        site.remember("small", *[(20, 6, 6.5)] * 5)
        yield site


def page_of(site: Site, path: str = "/quality", key: str = ADMIN_KEY) -> str:
    with site.visitor(key) as visitor:
        return visitor.get(path).text


def row_of(page: str, model: str) -> str:
    table = page[page.index('id="models"') : page.index('id="course"')]
    (row,) = re.findall(rf'<tr>\s*<th><a href="[^"]*">{model}</a>.*?</tr>', table, re.DOTALL)
    return text_of(row)


def test_measured_and_observed_stand_side_by_side_with_bounds_labels_and_the_test(graded: Site) -> None:
    page = page_of(graded)
    small, medium = row_of(page, "small"), row_of(page, "medium")

    assert re.search(r"as measured 0\.3\d 0\.\d\d–0\.\d\d 0\.30 0\.2\d–0\.3\d 100 0\.\d+ 20\d\d-", small)
    assert "no feedback" in medium
    assert "two-proportion z-test" in text_of(page)


def test_a_model_that_became_worse_is_flagged_from_its_hour_on_with_what_to_do(graded: Site) -> None:
    page = page_of(graded)
    since = datetime.fromtimestamp((time.time() // 3600 - 1) * 3600, UTC)

    assert f"large became worse. Since {since:%Y-%m-%d %H}:00 UTC 55% of its answers are graded wrong" in text_of(page)
    assert "before 15% (180 labels)" in text_of(page)
    assert "became worse" in row_of(page, "large")
    assert "Measure large again" in page
    assert "Measure small again" not in page
    assert "feedback: adapt" in text_of(page)


def test_a_viewer_reads_it_and_has_no_button(graded: Site) -> None:
    key = graded.make_key("viewer")["key"]
    page = page_of(graded, key=key)

    assert "large became worse" in text_of(page)
    assert "<form" not in page[page.index('class="notice') : page.index('id="held"')]
    with graded.visitor(key) as visitor:
        assert visitor.send("/model/profile", {"name": "large"}).status_code == 403


def test_the_course_is_drawn_by_hour_or_day_with_a_table_of_the_same_figures(graded: Site) -> None:
    by_hour, by_day, odd = (page_of(graded, f"/quality?by={by}") for by in ("hour", "day", "<b>"))
    marks = re.findall(r"large, [\d-]+ \d\d:00: observed 0\.55 \(0\.\d\d to 0\.\d\d\), 20\.0 labels; expected", by_hour)

    assert len(marks) == 2 * len(WORSE)  # the title of a mark, and its name for screen readers
    assert re.search(r"<th>[\d-]+ \d\d:00</th><td>0\.55</td>", by_hour)
    assert re.search(r"<th>\d{4}-\d\d-\d\d</th><td>0\.\d\d</td>", by_day)
    assert "Observed errors by hour" in odd


def test_each_cluster_has_what_was_observed_beside_what_was_measured(graded: Site) -> None:
    page = page_of(graded)
    clusters = page[page.index("large by cluster") :]

    assert "too few labels" in clusters
    assert re.search(r'cluster\?id=\d+">[^<]+</a></th>', clusters)


def test_whether_quality_held_is_said_with_bounds(graded: Site) -> None:
    def held() -> bool:
        page = text_of(page_of(graded))
        return bool(re.search(r"Routed, expected [\d.]+ % [\d.]+ % [\d.]+ % 2 ", page))

    assert wait_until(held)
    page = text_of(page_of(graded))
    assert "Of 100 requests, routing is expected to get" in page
    assert re.search(r"Routed, observed 50\.0 %", page)


def test_a_source_is_shown_and_not_run(graded: Site) -> None:
    decision = graded.ask("What is 2 + 2?", **BEST)
    said = {"decision": decision, "score": 0.5, "source": "<script>alert(1)</script>"}
    assert graded.proxy.admin("POST", "/v1/feedback", said).status_code == 200
    page = page_of(graded)

    assert "<script>alert" not in page
    assert re.search(r"<th>&lt;script&gt;alert\(1\)&lt;/script&gt;</th><td>1</td><td>0\.50</td>", page)


def traffic(site: Site, *, prompts: int, clusters: int, novel: float = 0.0) -> None:
    """Let today's traffic be so many prompts, in 24 blocks, spread evenly over the first clusters of the map."""
    size, blocks = builtin_map().size, 24
    with site.store() as store:
        key = f"uniroute:traffic:{builtin_map().id}:{datetime.now(UTC):%Y-%m-%d}"
        each = prompts / blocks
        fields = {"n": float(prompts), "blocks": float(blocks), "nn": blocks * each**2}
        shares = {str(k): 1 / clusters for k in range(min(clusters, size))} | ({"novel": novel} if novel else {})
        for name, share in shares.items():
            fields |= {
                f"s:{name}": prompts * share,
                f"q:{name}": blocks * (each * share) ** 2,
                f"p:{name}": blocks * each**2 * share,
            }
        store.delete(key)
        store.hset(key, mapping={name: str(value) for name, value in fields.items()})


def test_traffic_in_few_clusters_of_the_map_is_said_with_the_commands_that_fit_another(graded: Site) -> None:
    traffic(graded, prompts=50_000, clusters=4)
    page = page_of(graded)

    assert re.search(r"Fit a map of your own: 9\d% of the traffic would have to be in other clusters", text_of(page))
    assert "uniroute fit traffic.jsonl --out mymap" in page
    assert page.count('class="bar mark"') >= builtin_map().size
    assert page.count('class="own"') == builtin_map().size
    assert "Fit a map of your own" in page_of(graded, "/models")


def test_many_novel_prompts_are_a_reason_too_and_few_prompts_none(graded: Site) -> None:
    traffic(graded, prompts=50_000, clusters=64, novel=0.09)
    assert re.search(r"9\.0% of the prompts are far from all of its clusters", text_of(page_of(graded)))
    traffic(graded, prompts=500, clusters=4, novel=0.5)
    assert "Too little is known yet" in text_of(page_of(graded))
    traffic(graded, prompts=50_000, clusters=64, novel=0.02)
    page = text_of(page_of(graded))
    assert "The map is good for this traffic" in page
    assert "Novel prompts 2.0 %" in page


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Site]:
    with open_site(tmp_path_factory.mktemp("fresh"), embedder_cache) as site:
        yield site


def test_without_feedback_and_traffic_the_view_says_how_to_give_it(fresh: Site) -> None:
    page = text_of(page_of(fresh))

    assert "POST /v1/feedback" in page
    assert "No prompt was routed in the last 7 days" in page
    assert "Of no request" in page


def test_routed_prompts_reach_the_view_and_dry_runs_do_not(fresh: Site) -> None:
    for _ in range(3):
        fresh.ask("the heron on the weir")
    dry = {"model": "auto", "messages": [{"role": "user", "content": "the heron on the weir"}]}
    assert fresh.proxy.admin("POST", "/v1/route", dry).json()["novel"] is True
    assert wait_until(lambda: "Prompts, the last 7 days 3 " in text_of(page_of(fresh)))
    assert "Novel prompts 100.0 %" in text_of(page_of(fresh))


def test_a_model_is_measured_again_from_here_and_judged_by_what_comes_after(fresh: Site) -> None:
    fresh.ask("What is 2 + 2?", score=1.0, **BEST)
    fresh.remember("large", *QUIET, *WORSE)
    with fresh.visitor() as visitor:
        assert "large became worse" in text_of(visitor.get("/quality").text)
        assert visitor.send("/model/profile", {"name": "large"}, page="/quality").is_redirect
        assert wait_until(lambda: "large became worse" not in text_of(visitor.get("/quality").text))
