from __future__ import annotations

import html
import re
from pathlib import Path

import httpx
import pytest
from redis import Redis

from router_core.artifact import builtin_map
from tests.dashboard.site import MODELS, Site, open_site
from tests.support.scripted_answers import Step
from tests.support.waiting import wait_until


def text_of(page: str) -> str:
    """Return what a page says, without its markup."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<(title|script)[^>]*>.*?</\1>|<[^>]+>", " ", page)))


def ask(site: Site, key: str | None = None, **uniroute: object) -> httpx.Response:
    body = {"model": "auto", "messages": [{"role": "user", "content": "What is 2 + 2?"}], "uniroute": uniroute}
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{site.proxy.url}/v1/chat/completions", json=body, headers=headers, timeout=60)


def test_the_first_view_shows_requests_spending_health_and_the_store(site: Site) -> None:
    key = site.make_key("client")["key"]
    answered = [ask(site, key, **{"lambda": 0}) for _ in range(3)]
    with site.visitor() as visitor:
        assert wait_until(lambda: answered[0].headers["x-uniroute-model"] in shares_in(visitor.get(site.url).text))
        page = text_of(visitor.get(site.url).text)

    assert [reply.status_code for reply in answered] == [200] * 3
    assert all(words in page for words in ("Requests a second", "Added latency", "Spending an hour", "Store up"))
    assert page.count(" ready ") >= len(MODELS)


def shares_in(page: str) -> str:
    return text_of(page[page.index('id="shares"') : page.index('id="health"')])


def test_a_model_that_rests_is_shown_with_the_reason(tmp_path: Path, embedder_cache: Path) -> None:
    with open_site(tmp_path, embedder_cache, breaker={"failures": 1, "cooldown_s": 60}) as site:
        site.upstream.always = Step(status=500, body={"error": {"message": "broken"}})
        ask(site, None, **{"lambda": 0, "fallbacks": False})
        with site.visitor() as visitor:
            assert "resting" in text_of(visitor.get(site.url).text)


def test_the_heat_map_has_a_mark_and_a_figure_for_each_model_in_each_cluster(site: Site) -> None:
    with site.visitor() as visitor:
        page = visitor.get("/models").text
    cells = len(MODELS) * builtin_map().size

    assert len(re.findall(r'<rect class="mark h\d"', page)) == cells
    assert len(re.findall(r"<td>\d\.\d\d <small>\d\.\d\d–\d\.\d\d, n \d+\.\d</small></td>", page)) == cells
    assert page.count('tabindex="0" x=') == 1


def test_a_cluster_shows_its_words_its_models_and_its_prompts(site: Site) -> None:
    with site.visitor() as visitor:
        page = text_of(visitor.get("/cluster?id=3").text)
        assert visitor.get("/cluster?id=64").status_code == visitor.get("/cluster?id=x").status_code == 404

    assert builtin_map().names[3] in page
    assert all(name in page for name, _, _ in MODELS)
    assert "validation prompts belong here" in page


def test_the_curve_says_what_another_lambda_would_cost(site: Site) -> None:
    with site.visitor() as visitor:
        dear, cheap = (text_of(visitor.get(f"/curve/point?lambda={each}").text) for each in ("0", "1000"))
        page = visitor.get("/curve?lambda=0.5").text
        assert visitor.get("/curve?lambda=-1").status_code == 400
        assert visitor.get("/curve?lambda=nan").status_code == 400

    costs = [float(re.search(r"Cost of 1,000 requests \$([\d.]+)", each)[1]) for each in (dear, cheap)]  # type: ignore[index]
    assert costs[0] > costs[1]
    assert re.search(r"Share of the requests small [5-9]\d\.\d %", cheap)
    assert re.search(r"Share of the requests large (100|[5-9]\d)\.\d %", dear)
    assert "lambda: 0.5" in page
    assert page.count('class="single mark"') == len(MODELS)


def test_explain_shows_why_each_candidate_lost_and_when_it_would_win(site: Site) -> None:
    asked = len(site.upstream.history)
    with site.visitor() as visitor:
        page = text_of(visitor.send("/explain", {"text": "Sort a list of words.", "lambda": "0"}).text)

    assert "large at λ = 0" in page.replace("large scored, at", "large at")
    assert page.count("more errors") == len(MODELS) - 1
    assert "What the prompt is like" in page
    assert len(site.upstream.history) == asked


def test_explain_takes_a_whole_request_and_refuses_it_as_the_api_does(site: Site) -> None:
    whole = '{"model": "small", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}'
    wrong = '{"model": "auto", "messages": [{"role": "user", "content": "Hi"}], "uniroute": {"lamda": 1}}'
    with site.visitor() as visitor:
        pinned = visitor.send("/explain", {"text": whole})
        refused = visitor.send("/explain", {"text": wrong})
        empty = visitor.send("/explain", {"text": " "})

    assert "pinned, at λ" in text_of(pinned.text)
    assert (refused.status_code, empty.status_code) == (400, 400)
    assert "lamda" in text_of(refused.text)


def test_the_form_keeps_what_was_written_if_it_is_refused(site: Site) -> None:
    with site.visitor() as visitor:
        form = {"model_name": "kept-name", "model": "openai/m", "api_base": "nowhere"}
        reply = visitor.send("/models", form)

    assert reply.status_code == 400
    assert "must be an http or https address" in html.unescape(reply.text)
    assert 'value="kept-name"' in reply.text


def test_a_model_is_added_priced_measured_again_and_removed_as_by_the_api(site: Site) -> None:
    form = {
        "model_name": "extra/one",
        "model": "openai/extra",
        "api_base": site.upstream.url,
        "api_key": "os.environ/MODEL_API_KEY",
        "input_cost_per_token": "0.15",
        "output_cost_per_token": "0.6",
        "prompts": "5",
        "max_usd": "1",
    }
    with site.visitor() as visitor:
        added = visitor.send("/models", form)
        assert (added.status_code, added.headers["location"]) == (303, "/dashboard/model?name=extra%2Fone")

        def page() -> str:
            return text_of(visitor.get("/model?name=extra%2Fone").text)

        assert wait_until(lambda: "State ready" in page())
        assert "5 of 5 prompts" in page()
        assert visitor.send(
            "/model/price", {"name": "extra/one", "input_cost_per_token": "0.2", "output_cost_per_token": "0.8"}
        ).is_redirect
        assert "$0.2 a million tokens" in page()
        assert visitor.send("/model/profile", {"name": "extra/one", "prompts": "6"}).is_redirect
        assert wait_until(lambda: "6 of 6 prompts" in page())
        price = site.proxy.admin("GET", "/admin/models/extra/one").json()["price"]
        assert price["input_cost_per_token"] == pytest.approx(2e-7)
        assert visitor.send("/model/remove", {"name": "extra/one"}).headers["location"] == "/dashboard/models"
        assert visitor.get("/model?name=extra%2Fone").status_code == 404
    entries = site.proxy.admin("GET", "/admin/audit?limit=10").json()["entries"]
    mine = [entry["action"] for entry in entries if entry["target"] == "extra/one" and entry["who"] == "root"]
    assert mine == ["models.remove", "models.profile", "models.price", "models.add"]


def test_a_model_is_added_with_the_efforts_that_are_measured_apart(site: Site) -> None:
    form = {
        "model_name": "thinker",
        "model": "openai/thinker",
        "api_base": site.upstream.url,
        "api_key": "os.environ/MODEL_API_KEY",
        "input_cost_per_token": "1",
        "output_cost_per_token": "1",
        "effort": "high, low",
        "prompts": "5",
    }
    with site.visitor() as visitor:
        assert visitor.send("/models", form).headers["location"] == "/dashboard/model?name=thinker"
        assert site.proxy.admin("GET", "/admin/models/thinker").json()["efforts"] == ["thinker@low", "thinker@high"]
        assert visitor.get("/model?name=thinker").status_code == 200
        assert visitor.send("/model/remove", {"name": "thinker"}).is_redirect
        refused = visitor.send("/models", {**form, "effort": "loud"})
    assert refused.status_code == 400
    assert 'value="loud"' in refused.text


def test_a_model_of_the_configuration_cannot_be_removed_here(site: Site) -> None:
    with site.visitor() as visitor:
        assert "Remove large" not in visitor.get("/model?name=large").text
        reply = visitor.send("/model/remove", {"name": "large"})

    assert reply.status_code == 409
    assert "configuration file" in text_of(reply.text)


def test_a_key_is_made_shown_once_and_revoked(site: Site) -> None:
    form = {"name": "the team", "role": "client", "models": "large, small", "requests_per_minute": "60"}
    with site.visitor() as visitor:
        made = visitor.send("/keys", {**form, "usd_per_month": "5", "expires_in_days": "30"})
        secret = re.search(r"ur-[\w-]{43}", made.text)
        assert made.status_code == 201
        assert secret
        listed = visitor.get("/keys").text
        assert secret[0] not in listed
        assert all(words in text_of(listed) for words in ("the team", "60 requests a minute", "$5.00 a month"))
        key_id = re.search(r"has the key (\w+)", text_of(made.text))
        assert key_id
        assert ask(site, secret[0]).status_code == 200
        assert visitor.send("/keys/revoke", {"id": key_id[1]}).is_redirect
        assert ask(site, secret[0]).status_code == 401
        assert visitor.send("/keys/revoke", {"id": "nobody"}).status_code == 404
        assert visitor.send("/keys", {"name": "x", "usd_per_day": "-1"}).status_code == 400


def test_what_a_key_has_spent_is_shown(site: Site) -> None:
    made = site.make_key("client")
    assert ask(site, made["key"]).status_code == 200

    def spent(page: str) -> str:
        row = page[page.index(made["id"]) :]
        return text_of(row[: row.index("</tr>")])

    with site.visitor() as visitor:
        assert wait_until(lambda: re.search(r"\$0\.\d*[1-9]", spent(visitor.get("/keys").text)) is not None)


def test_views_that_need_no_store_are_there_without_it(tmp_path: Path, embedder_cache: Path) -> None:
    with open_site(tmp_path, embedder_cache) as site, site.visitor() as visitor:
        with Redis(unix_socket_path=str(site.proxy.folder / "valkey" / "valkey.sock")) as direct:
            direct.client_pause(20_000, all=True)
        assert wait_until(lambda: "does not answer" in text_of(visitor.get(site.url).text))
        assert visitor.get("/models").status_code == 200
        assert visitor.get("/keys").status_code == 503
