"""What the page sets while the server runs: the default λ, and pauses of models."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.dashboard.site import MODELS, Site, Visitor
from tests.dashboard.test_answers import Markup
from tests.dashboard.test_views import text_of
from tests.support.waiting import wait_until

BUTTON = "Use this λ"


@pytest.fixture(autouse=True)
def restored(site: Site) -> Iterator[None]:
    yield
    site.proxy.admin("DELETE", "/admin/settings")
    for name, _, _ in MODELS:
        site.proxy.admin("PATCH", f"/admin/models/{name}", {"paused": False})


def lambda_of(site: Site) -> dict[str, Any]:
    return dict(site.proxy.admin("GET", "/admin/settings").json()["lambda"])


def confirm(visitor: Visitor, path: str, **changed: str) -> Any:
    """Press the button of a page that asks for confirmation; the form's hidden fields go with it."""
    page = visitor.get(path).text
    form = page[page.index('<form method="post" action="/dashboard/curve/change"') :]
    hidden = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', form[: form.index("</form>")]))
    return visitor.client.post("/curve/change", data={**hidden, **changed})


def test_the_page_shows_what_a_lambda_changes_before_it_is_set(site: Site) -> None:
    with site.visitor() as visitor:
        before = text_of(visitor.get("/curve?lambda=5").text)
        asked = visitor.get("/curve/change?lambda=5").text
        unchanged = lambda_of(site)["source"]
    page = text_of(asked)

    assert BUTTON in before
    assert "The default λ is 0.1, of the configuration." in before
    assert "Use λ = 5?" in page
    assert re.search(r"Expected quality −\d+\.\d points from \d+\.\d % to \d+\.\d %, \d+\.\d % to \d+\.\d %", page)
    assert re.search(r"Cost of 1,000 requests \$[\d.]+ now \$[\d.]+, −\d+ %", page)
    row = r"<tr[^>]*><th>([\w-]+)</th>.*?<td>([\d.]+) %</td>.*?<td>([\d.]+) %</td></tr>"
    shares = re.findall(row, asked, re.DOTALL)
    assert {name for name, _, _ in shares} == {name for name, _, _ in MODELS}
    for column in (1, 2):
        assert sum(float(row[column]) for row in shares) == pytest.approx(100, abs=0.3)
    assert unchanged == "config"
    assert (Markup(asked).inline, Markup(asked).foreign) == ([], [])


def test_it_is_set_and_shown_with_its_source_and_taken_back_to_the_configuration(site: Site) -> None:
    with site.visitor() as visitor:
        assert confirm(visitor, "/curve/change?lambda=5").headers["location"] == "/dashboard/curve"
        stated = lambda_of(site)
        curve, first = text_of(visitor.get("/curve").text), text_of(visitor.get(site.url).text)
        back = text_of(visitor.get("/curve/change").text)
        assert confirm(visitor, "/curve/change").is_redirect
        reset = lambda_of(site)

    assert (stated["value"], stated["set_by"]) == (5, "root")
    assert re.search(
        r"The default λ is 5, set by root, \d+ s ago \([\d: -]+ UTC\); the configuration has 0\.1\.", curve
    )
    assert "Back to the configuration" in curve
    assert re.search(r"λ 5 set by root, \d+ s ago", first)
    assert "Go back to the configuration’s λ = 0.1?" in back
    assert (reset["value"], reset["source"]) == (0.1, "config")
    trail = site.proxy.admin("GET", "/admin/audit?limit=2").json()["entries"]
    assert [(entry["who"], entry["action"], entry["target"]) for entry in trail] == [
        ("root", "settings.reset", ""),
        ("root", "settings.change", "lambda=5"),
    ]


def test_a_change_that_was_made_against_another_lambda_is_refused(site: Site) -> None:
    with site.visitor() as visitor:
        refused = confirm(visitor, "/curve/change?lambda=5", before="0.3")
        wrong = confirm(visitor, "/curve/change?lambda=5", **{"lambda": "-1"})
        assert visitor.get("/curve/change?lambda=nan").status_code == 400

    assert (refused.status_code, wrong.status_code) == (409, 400)
    assert "λ was changed to 0.1 meanwhile" in text_of(refused.text)
    assert lambda_of(site)["source"] == "config"


def test_lambda_can_be_set_where_there_is_no_curve(site: Site) -> None:
    for name, _, _ in MODELS:
        site.proxy.admin("PATCH", f"/admin/models/{name}", {"paused": True})
    with site.visitor() as visitor:
        curve, page = text_of(visitor.get("/curve").text), text_of(visitor.get("/curve/change?lambda=2").text)
        assert confirm(visitor, "/curve/change?lambda=2").is_redirect

    assert "The curve needs a model that is measured" in curve
    assert "The default λ is 0.1" in curve
    assert "What it would change cannot be said" in page
    assert lambda_of(site)["value"] == 2


def test_the_lambda_in_force_is_that_of_explain_and_of_today(site: Site) -> None:
    site.proxy.admin("PUT", "/admin/settings", {"lambda": 1000})
    with site.visitor() as visitor:
        page = text_of(visitor.send("/explain", {"text": "Sort a list of words."}).text)
        curve, point = visitor.get("/curve").text, text_of(visitor.get("/curve/point?lambda=1").text)

    assert "at λ = 1000" in page
    assert "Beside today's λ = 1000" in html.unescape(point)
    assert re.search(r'class="today mark"[^>]*aria-label="Today: λ = 1e\+03', curve)


def test_a_model_of_the_configuration_is_paused_and_resumed(site: Site) -> None:
    with site.visitor() as visitor:
        assert "Pause large" in visitor.get("/model?name=large").text
        reply = visitor.send("/model/pause", {"name": "large", "paused": "1"})
        assert (reply.status_code, reply.headers["location"]) == (303, "/dashboard/model?name=large")
        page = text_of(visitor.get("/model?name=large").text)
        views = [text_of(visitor.get(path).text) for path in ("/models", site.url)]
        explained = text_of(visitor.send("/explain", {"text": "Hi there.", "lambda": "0"}).text)
        curve = visitor.get("/curve").text
        assert visitor.send("/model/pause", {"name": "large", "paused": "0"}).is_redirect
        resumed = text_of(visitor.get("/model?name=large").text)

    assert re.search(r"This model is paused by root since \d{4}-\d\d-\d\dT[\d:]+Z: no request is routed to it", page)
    assert "Resume large" in page
    assert "Pause the model" not in page
    assert all("large ready paused" in view for view in views)
    assert "large paused; PATCH /admin/models/large" in explained.replace(": paused", " paused")
    assert curve.count('class="single mark"') == len(MODELS) - 1
    assert "paused" not in resumed.replace("Pause", "")
    trail = site.proxy.admin("GET", "/admin/audit?limit=2").json()["entries"]
    assert [(entry["action"], entry["target"]) for entry in trail] == [
        ("models.resume", "large"),
        ("models.pause", "large"),
    ]


def test_a_viewer_sees_both_and_presses_neither(site: Site) -> None:
    made = site.make_key("viewer")
    site.proxy.admin("PUT", "/admin/settings", {"lambda": 0.7})
    with site.visitor(made["key"]) as visitor:
        pages = [visitor.get(path).text for path in ("/curve?lambda=5", "/curve/change?lambda=5", "/model?name=large")]
        refused = [
            visitor.send("/curve/change", {"lambda": "5", "before": "0.69999999999999996"}),
            visitor.send("/curve/change", {"lambda": "", "before": "0.69999999999999996"}),
            visitor.send("/model/pause", {"name": "large", "paused": "1"}),
        ]

    assert "The default λ is 0.7, set by root" in text_of(pages[0])
    assert "What changes" in pages[1]
    assert not re.search(r"Use this λ|Back to the configuration|<button>Use|Pause large", "".join(pages))
    assert [reply.status_code for reply in refused] == [403] * 3
    assert lambda_of(site)["value"] == 0.7
    assert site.proxy.admin("GET", "/admin/models/large").json()["paused"] is False
    line = f"who={made['id']} action=dashboard/model/pause target=- outcome=403"
    assert wait_until(lambda: line in site.proxy.log)


@pytest.mark.parametrize("path", ["/curve/change", "/model/pause"])
def test_a_form_without_its_token_or_of_another_site_changes_nothing(site: Site, path: str) -> None:
    form = {"lambda": "5", "before": "0.10000000000000001", "name": "large", "paused": "1"}
    with site.visitor() as visitor, site.visitor() as other:
        token = other.get("/keys").text.split('name="token" value="')[1].split('"')[0]
        own = visitor.get("/keys").text.split('name="token" value="')[1].split('"')[0]
        assert visitor.client.post(path, data=form).status_code == 403
        assert visitor.client.post(path, data={**form, "token": token}).status_code == 403
        visitor.client.headers["origin"] = "http://evil.example"
        assert visitor.client.post(path, data={**form, "token": own}).status_code == 403

    assert lambda_of(site)["source"] == "config"
    assert site.proxy.admin("GET", "/admin/models/large").json()["paused"] is False


def test_a_client_key_opens_neither(site: Site) -> None:
    made = site.make_key("client")
    with site.visitor(None) as visitor:
        visitor.log_in(made["key"])
        assert visitor.get("/curve/change?lambda=5").status_code == 303
