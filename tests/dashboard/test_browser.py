"""The page in a real browser: what its scripts do, what axe finds, and that nothing is blocked or fetched elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.dashboard.screenshots import (
    COURSE,
    INSTALL,
    PAGES,
    PROMPT,
    SCHEMES,
    WIDTHS,
    browser_path,
    explain,
    grade,
    log_in,
    measured_model,
    model_with_history,
    open_browser,
    open_view,
)
from tests.dashboard.site import Site, open_site

MISSING = browser_path() is None or find_spec("playwright") is None or find_spec("axe_playwright_python") is None

pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING, reason=f"no browser here: {INSTALL}")]

SERIOUS = ("serious", "critical")


@pytest.fixture(scope="module", autouse=True)
def feedback(site: Site) -> None:
    grade(site)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


@contextmanager
def visit(browser: Any, site: Site, width: int = 1280, scheme: str = "light") -> Iterator[Any]:
    """Open a page that is logged in; fail if the browser complains of anything, or asks another server."""
    complaints: list[str] = []
    with browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme) as context:
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda asked: None if asked.url.startswith(site.url) else complaints.append(asked.url))
        log_in(page, site)
        yield page
        assert complaints == []


def wait_for_change(page: Any, selector: str, before: str) -> None:
    changed = "([selector, before]) => document.querySelector(selector).innerText !== before"
    page.wait_for_function(changed, arg=[selector, before])


def press(page: Any, what: str, key: str = "Enter") -> None:
    """Press what has this text by the keyboard, after it was reached by it."""
    reached = "text => (document.activeElement.textContent || '').trim().startsWith(text)"
    for _ in range(200):
        if page.evaluate(reached, what):
            page.keyboard.press(key)
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{what!r} is not reached by the keyboard")


def serious(page: Any) -> list[str]:
    axe = import_module("axe_playwright_python.sync_playwright").Axe()
    found = axe.run(page).response["violations"]
    return [
        f"{each['id']}: {node['html'][:200]}" for each in found if each["impact"] in SERIOUS for node in each["nodes"]
    ]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_view_is_free_of_errors_and_of_serious_findings(
    browser: Any, site: Site, width: int, scheme: str
) -> None:
    with visit(browser, site, width, scheme) as page:
        found = {}
        for name, path in PAGES.items():
            open_view(page, site, path)
            found[name] = serious(page)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        explain(page, site)
        found["explain"] = serious(page)

    assert {name: each for name, each in found.items() if each} == {}


def test_the_first_view_follows_what_happens(browser: Any, site: Site) -> None:
    with visit(browser, site) as page:
        before = page.locator("[data-part=tiles]").inner_text()
        site.proxy.admin(
            "POST", "/v1/chat/completions", {"model": "small", "messages": [{"role": "user", "content": "Hi"}]}
        )
        page.wait_for_function("before => document.querySelector('[data-part=tiles]').innerText !== before", arg=before)


def test_the_slider_shows_another_lambda_without_loading_the_page(browser: Any, site: Site) -> None:
    with visit(browser, site) as page:
        open_view(page, site, "/curve")
        slider = page.get_by_role("slider")
        before = page.locator("[data-part=point] dl").inner_text()
        slider.focus()
        page.keyboard.press("End")
        page.wait_for_function(
            "before => document.querySelector('[data-part=point] dl').innerText !== before", arg=before
        )
        assert f"lambda: {page.get_by_label('λ', exact=True).input_value()}" in page.content()


def test_arrow_keys_go_from_mark_to_mark_and_say_what_each_means(browser: Any, site: Site) -> None:
    with visit(browser, site) as page:
        page.goto(f"{site.url}/models")
        page.locator("svg[data-columns] .mark[tabindex='0']").focus()
        first = page.locator("#heat-readout").inner_text()
        page.keyboard.press("ArrowRight")
        beside = page.locator("#heat-readout").inner_text()
        page.keyboard.press("ArrowDown")
        below = page.locator("#heat-readout").inner_text()

    assert first.startswith("large in")
    assert beside.startswith("large in")
    assert not below.startswith("large in")
    assert len({first, beside, below}) == 3


def test_quality_is_read_by_keyboard_and_a_flagged_model_measured_again(
    browser: Any, tmp_path: Path, embedder_cache: Path
) -> None:
    with open_site(tmp_path, embedder_cache) as site, visit(browser, site) as page:
        grade(site)
        open_view(page, site, "/quality?by=hour")
        page.get_by_text("large became worse.").wait_for()
        chart = page.get_by_role("group", name="Observed errors of large by hour")
        readout = page.locator(f"#{chart.get_attribute('data-marks')}")
        chart.locator(".mark[tabindex='0']").focus()
        newest = readout.inner_text()
        page.keyboard.press("ArrowLeft")
        before = readout.inner_text()
        page.get_by_role("group", name="Share of each cluster").locator(".mark[tabindex='0']").focus()
        share = page.locator("#shares-readout").inner_text()
        page.get_by_role("button", name="Measure large again").press("Enter")
        page.wait_for_url("**/model?name=large")

    assert newest.startswith("large, ")
    assert before.startswith("large, ")
    assert newest != before
    assert "of the map's prompts" in share


def test_a_model_is_added_and_followed_until_it_is_ready(browser: Any, site: Site) -> None:
    with visit(browser, site) as page:
        page.goto(f"{site.url}/models")
        page.get_by_label("Name that clients use").fill("added-here")
        page.get_by_label("Model of the provider").fill("openai/added")
        page.get_by_label("Address, if not").fill(site.upstream.url)
        page.get_by_label("Key, by its variable").fill("os.environ/MODEL_API_KEY")
        page.get_by_label("Prompt, USD").fill("0.1")
        page.get_by_label("Answer, USD").fill("0.4")
        page.get_by_role("button", name="Add and measure").click()
        page.wait_for_url("**/model?name=added-here")
        page.goto(f"{site.url}/models")
        row = page.get_by_role("row", name="added-here").first
        row.get_by_text("8 of 8 prompts").wait_for(timeout=120_000)
        page.goto(f"{site.url}/model?name=added-here")
        page.get_by_text("Remove the model").click()
        page.get_by_role("button", name="Remove added-here").click()
        page.wait_for_url("**/models")


def test_everything_is_reached_by_keyboard_alone(browser: Any, site: Site) -> None:
    with visit(browser, site) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
        press(page, "Explain")
        page.wait_for_url("**/explain")
        page.get_by_label("A prompt").focus()
        page.keyboard.type(PROMPT)
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="What the prompt is like").wait_for()


@pytest.fixture(scope="module")
def prepared(site: Site) -> Iterator[int]:
    """Add a model with a history and one with answers; return the cluster of one of these."""
    model_with_history(site, "course")
    yield measured_model(site, "answered")
    for name in ("course", "answered"):
        site.proxy.admin("DELETE", f"/admin/models/{name}")
    site.proxy.admin("DELETE", "/admin/settings")


def test_another_lambda_is_looked_at_set_and_taken_back_by_keyboard(browser: Any, site: Site, prepared: int) -> None:
    with visit(browser, site) as page:
        open_view(page, site, "/curve")
        page.get_by_role("slider").focus()
        page.keyboard.press("End")
        chosen = page.get_by_label("λ", exact=True).input_value()
        page.get_by_label("λ", exact=True).focus()
        press(page, "Use this λ")
        page.get_by_role("heading", name=f"Use λ = {chosen}?").wait_for()
        assert serious(page) == []
        press(page, f"Use λ = {chosen}")
        page.get_by_text(f"The default λ is {chosen}, set by root").wait_for()
        assert serious(page) == []
        press(page, "Back to the configuration")
        page.get_by_role("heading", name="Go back to the configuration").wait_for()
        press(page, "Go back to λ = 0.1")
        page.get_by_text("The default λ is 0.1, of the configuration.").wait_for()


def test_a_model_is_paused_and_resumed_by_keyboard(browser: Any, site: Site, prepared: int) -> None:
    with visit(browser, site) as page:
        page.goto(f"{site.url}/model?name=course")
        press(page, "Pause the model")
        press(page, "Pause course")
        page.get_by_text("This model is paused by root since").wait_for()
        assert serious(page) == []
        page.goto(f"{site.url}/models")
        page.get_by_role("row", name="course").first.get_by_text("paused").wait_for()
        page.goto(f"{site.url}/model?name=course")
        press(page, "Resume course")
        page.get_by_text("Pause the model").wait_for()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_history_and_the_answers_are_read_by_keyboard_at_every_width(
    browser: Any, site: Site, prepared: int, width: int, scheme: str
) -> None:
    with visit(browser, site, width, scheme) as page:
        page.goto(f"{site.url}/model?name=course")
        mark = page.locator("svg[data-marks=history-readout] .mark[tabindex='0']")
        mark.focus()
        newest = page.locator("#history-readout").inner_text()
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        before = page.locator("#history-readout").inner_text()
        found = serious(page)
        fits = [page.evaluate("document.documentElement.scrollWidth <= innerWidth")]
        open_view(page, site, f"/cluster?id={prepared}")
        press(page, "Answers of 1 model")
        page.get_by_text("An answer of the scripted model.").first.wait_for()
        found += serious(page)
        fits += [page.evaluate("document.documentElement.scrollWidth <= innerWidth")]

    assert f"mean error {COURSE[-1]:.2f}"[:-1] in newest
    assert "differs from the one before" not in newest
    assert len({newest, before}) == 2
    assert (found, fits) == ([], [True, True])


def test_a_viewer_has_no_button_of_these(browser: Any, site: Site, prepared: int) -> None:
    key = site.make_key("viewer")["key"]
    with browser.new_context(viewport={"width": 1280, "height": 800}) as context:
        page = context.new_page()
        log_in(page, site, key)
        for path in ("/curve", "/curve/change?lambda=5", "/model?name=course"):
            open_view(page, site, path)
            assert page.get_by_role("button").all_inner_texts() in (["Log out"], ["Log out", "Show"])
