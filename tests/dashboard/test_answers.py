"""What every answer under /dashboard carries, and what it leaves out."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import httpx
import pytest

from proxy.dashboard.answers import shown_prompts
from proxy.dashboard.page import environment
from proxy.dashboard.pictures import RateInterval, heat_map
from proxy.dashboard.sessions import Session
from proxy.profiling.job_store import AnswerText, PromptAnswer
from proxy.server.auth import Principal
from proxy.settings.schema import Settings
from router_core.validation.graders.text import ExactGrader
from router_core.validation.validation_set import ValidationPrompt
from tests.dashboard.site import Site

VIEWS = (
    *("", "/models", "/model?name=large", "/cluster?id=3", "/curve", "/curve?lambda=0.5", "/curve/change?lambda=0.5"),
    *("/explain", "/keys"),
    *("/savings", "/quality", "/quality?by=hour"),
)
OTHERS = ("/login", "/nothing", "/", "/static/page.css", "/static/page.js", "/static/nothing", "/curve/point?lambda=1")

CELL = '"><script>alert(1)</script><img src=x onerror=alert(1)>'


class Markup(HTMLParser):
    """Collect the tags of a page, and refuse what the policy would not let run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.inline: list[str] = []
        self.foreign: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.inline += [name for name in found if name.startswith("on") or name == "style"]
        self.inline += [tag] if tag == "style" or (tag == "script" and not found.get("src")) else []
        addresses = [found.get(name) or "" for name in ("src", "href", "action", "data-events", "data-url")]
        self.foreign += [address for address in addresses if ":" in address or address.startswith("//")]
        self.ids += [str(found["id"])] if "id" in found else []


@pytest.mark.parametrize("path", [*VIEWS, *OTHERS])
def test_every_answer_carries_the_policy_and_is_not_kept(site: Site, path: str) -> None:
    with site.visitor() as visitor:
        headers = visitor.get(site.url + path).headers

    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "same-origin"
    files = path.startswith("/static/page")
    assert headers["cache-control"] == ("no-cache" if files else "no-store")


def test_refusals_before_the_page_carry_the_policy_too(site: Site) -> None:
    refused = [
        httpx.get(f"{site.url}/models", headers={"host": "evil.example"}),
        httpx.get(f"{site.url}/models", headers={"origin": "http://evil.example"}),
        httpx.put(f"{site.url}/models"),
    ]

    assert [reply.status_code for reply in refused] == [403, 403, 405]
    assert all("default-src 'none'" in reply.headers["content-security-policy"] for reply in refused)
    assert "content-security-policy" not in httpx.get(f"{site.proxy.url}/healthz").headers


@pytest.mark.parametrize("path", VIEWS)
def test_a_view_is_whole_and_has_nothing_inline_and_nothing_from_elsewhere(site: Site, path: str) -> None:
    with site.visitor() as visitor:
        reply = visitor.get(site.url + path)
    page = Markup(reply.text)

    assert reply.status_code == 200
    assert (page.inline, page.foreign) == ([], [])
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("h1") == page.tags.count("main") == 1
    assert reply.text.rstrip().endswith("</html>")


def test_what_a_model_is_called_is_shown_and_not_run(site: Site) -> None:
    with site.visitor() as visitor:
        named = visitor.send("/model/remove", {"name": CELL})
        by_address = visitor.get(f"/model?name={CELL}")

    for reply in (named, by_address):
        assert reply.status_code == 404
        assert "<script>alert" not in reply.text
        assert "<img" not in reply.text
        assert "&lt;script&gt;" in reply.text


@pytest.mark.parametrize(
    ("path", "field"), [("/explain", "text"), ("/explain", "lambda"), ("/models", "model_name"), ("/keys", "name")]
)
def test_what_a_form_holds_is_shown_and_not_run(site: Site, path: str, field: str) -> None:
    form = {"text": "x", "model_name": "m", "model": "nothing", "name": "n", "role": "nobody", field: CELL}
    with site.visitor() as visitor:
        reply = visitor.send(path, form)

    page = Markup(reply.text)
    assert "<script>alert" not in reply.text
    assert (page.inline, page.tags.count("img")) == ([], 0)


def test_the_name_of_a_key_is_shown_and_not_run(site: Site) -> None:
    site.proxy.admin("POST", "/admin/keys", {"name": f"{CELL} of a key"})
    with site.visitor() as visitor:
        page = visitor.get("/keys").text

    assert "of a key" in page
    assert (Markup(page).inline, Markup(page).tags.count("img")) == ([], 0)


def test_a_request_that_is_explained_is_shown_and_not_run(site: Site) -> None:
    body = {"model": CELL, "messages": [{"role": "user", "content": CELL}]}
    with site.visitor() as visitor:
        reply = visitor.send("/explain", {"text": json.dumps(body)})

    assert reply.status_code in (400, 404)
    assert (Markup(reply.text).inline, Markup(reply.text).tags.count("img")) == ([], 0)


def test_words_of_a_map_of_a_validation_set_and_of_answers_are_shown_and_not_run() -> None:
    rate = RateInterval(0.2, 0.1, 0.3, 4.0)
    asked = ({"role": "user", "content": CELL},)
    prompt = ValidationPrompt("p", CELL, asked, ExactGrader((CELL,)), 10, reference=CELL)
    answer = PromptAnswer(score=1.0, finish_reason=CELL, text=AnswerText.of(CELL))
    common = {
        "base": "/dashboard",
        "here": "",
        "store_available": True,
        "session": Session(Principal("root"), "nonce", 0, "token"),
    }
    cluster = environment().get_template("cluster.html")
    models = environment().get_template("models.html")
    pages = [
        cluster.render(
            **common,
            number=0,
            name=CELL,
            rates={CELL: rate},
            prompts=shown_prompts([(prompt, 0.5)], {CELL: {"p": answer}}),
            in_all=1,
            answered_by=[CELL],
        ),
        models.render(
            **common,
            problem=CELL,
            form={"model_name": CELL},
            cards=[],
            defaults=Settings().profile,
            names=[CELL],
            clusters=[(0, CELL)],
            rates={CELL: [rate]},
            picture=heat_map([CELL], [CELL], [[rate]]),
            traffic=None,
        ),
    ]

    for page in map(Markup, pages):
        assert (page.inline, page.tags.count("img")) == ([], 0)
        assert page.tags.count("script") == 1


def test_files_are_asked_for_again_only_if_they_have_changed(site: Site) -> None:
    first = httpx.get(f"{site.url}/static/page.css")
    again = httpx.get(f"{site.url}/static/page.css", headers={"if-none-match": first.headers["etag"]})

    assert (first.status_code, again.status_code, again.content) == (200, 304, b"")
    for outside in ("../page.py", "..%2Fpage.py", "%2e%2e/page.py", "page.py"):
        assert httpx.get(f"{site.url}/static/{outside}").status_code == 404


def test_a_form_of_another_kind_is_refused(site: Site) -> None:
    with site.visitor() as visitor:
        assert visitor.client.post("/explain", json={"text": "x"}).status_code == 415
        assert visitor.client.post("/explain", content=b"a=%ff", headers=_FORM).status_code == 400
        assert visitor.client.post("/explain", content=b"&".join([b"a=1"] * 500), headers=_FORM).status_code == 400
        assert visitor.client.post("/explain", content=b"a=" + b"x" * 60_000_000, headers=_FORM).status_code == 413


_FORM = {"content-type": "application/x-www-form-urlencoded"}


def test_the_page_stays_out_of_the_document_of_the_api(site: Site) -> None:
    reply = site.proxy.admin("GET", "/openapi.json")

    assert [path for path in reply.json()["paths"] if "dashboard" in path] == []


def test_a_stream_sends_parts_of_the_page(site: Site) -> None:
    with site.visitor() as visitor, visitor.client.stream("GET", "/now/events") as reply:
        lines = []
        for line in reply.iter_lines():
            lines.append(line)
            if line == "" and len(lines) > 3:
                break

    assert reply.headers["content-type"].startswith("text/event-stream")
    assert "content-security-policy" in reply.headers
    assert re.search(r'data: <div data-part="tiles">', "\n".join(lines))
