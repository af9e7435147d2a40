"""Take pictures of every view, at both widths and in both schemes: `python -m tests.dashboard.screenshots FOLDER`."""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx

from tests.conftest import CACHE
from tests.dashboard.site import Site, open_site, varied_profile
from tests.support.proxy_process import ADMIN_KEY, model_entry
from tests.support.waiting import wait_until

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

INSTALL = "apt-get install chromium && pip install playwright axe-playwright-python"

WIDTHS = (1280, 390)

SCHEMES = ("light", "dark")

PAGES = {
    "now": "",
    "models": "/models",
    "model": "/model?name=large",
    "cluster": "/cluster?id=3",
    "curve": "/curve?lambda=0.3",
    "change": "/curve/change?lambda=0.3",
    "savings": "/savings",
    "quality": "/quality?by=hour",
    "keys": "/keys",
}

PROMPT = "Write a function in Python that finds the longest word of a text, and explain how long it takes."


def browser_path() -> str | None:
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


@contextmanager
def open_browser() -> Iterator[Any]:
    """Open Debian's Chromium without a window."""
    playwright = import_module("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def traffic(site: Site) -> Iterator[None]:
    """Ask questions at some λ, now faster and now slower, as long as the block runs."""
    done = Event()

    def ask() -> None:
        site.make_key("viewer", usd_per_month=50)
        key = site.make_key("client", requests_per_minute=6000)["key"]
        with httpx.Client(base_url=site.proxy.url, headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
            asked = 0
            while not done.wait(0.02 + 0.08 * ((asked // 60) % 3)):
                asked += 1
                body = {
                    "model": "auto",
                    "messages": [{"role": "user", "content": f"{PROMPT} {asked % 7}"}],
                    "uniroute": {"lambda": (0.0, 0.05, 0.4, 2.0)[asked % 4]},
                }
                client.post("/v1/chat/completions", json=body)

    thread = Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def grade(site: Site) -> None:
    """Give feedback as if it had come for a day and a half, on a model that became worse lately and on others."""
    rng = random.Random(0)
    for number, cost_weight in enumerate((0.0, 0.0, 0.05, 0.4, 2.0) * 4):
        site.ask(f"{PROMPT} {number}", score=float(rng.random() < 0.8), uniroute={"lambda": cost_weight})
    for model, rate in (("large", 0.14), ("small", 0.33)):
        hours = [rng.randint(9, 26) for _ in range(36)]
        quiet = [(labels, sum(rng.random() < rate for _ in range(labels)), rate * labels) for labels in hours]
        worse = [(24, 11, 3.4), (21, 10, 2.9)] if model == "large" else []
        site.remember(model, *quiet, *worse)


def log_in(page: Any, site: Site, key: str = ADMIN_KEY) -> None:
    page.goto(f"{site.url}/login")
    page.get_by_label("Key").fill(key)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url(site.url)


def open_view(page: Any, site: Site, path: str) -> None:
    """Open a view, and wait until its figures are there."""
    page.goto(site.url + path)
    page.wait_for_function("() => document.querySelector('h1').textContent !== 'One moment'")


# Mean errors of the profiles of a model whose provider has changed it.
COURSE = (0.21, 0.2, 0.23, 0.19, 0.22, 0.2, 0.34, 0.36)


def measured_model(site: Site, name: str, prompts: int = 24) -> int:
    """Add a model, measure it, and return the cluster that one of its prompts is nearest to."""
    body = {**model_entry(name, site.upstream.url), "profile": {"prompts": prompts, "max_usd": 1}}
    job = site.proxy.admin("POST", "/admin/models", body).json()["job"]
    assert wait_until(lambda: site.proxy.admin("GET", f"/admin/jobs/{job}").json()["state"] == "ready")
    line = site.proxy.admin("GET", f"/admin/jobs/{job}/outcomes").json()["outcomes"][0]
    asked = {"model": "auto", "messages": [{"role": "user", "content": line["prompt"]}]}
    return int(site.proxy.admin("POST", "/v1/route", asked).json()["clusters"][0]["id"])


def model_with_history(site: Site, name: str) -> None:
    """Add a model with a profile for each mean error of COURSE."""
    first, *later = (varied_profile(name, mean, seed=7, labels=2.0) for mean in COURSE)
    body = {**model_entry(name, site.upstream.url), "profile": first}
    assert site.proxy.admin("POST", "/admin/models", body).status_code == 201
    for profile in later:
        assert site.proxy.admin("POST", f"/admin/models/{name}/profile", profile).status_code == 200


def explain(page: Any, site: Site) -> None:
    page.goto(f"{site.url}/explain")
    page.get_by_label("A prompt").fill(PROMPT)
    page.get_by_role("button", name="Explain").click()
    page.get_by_role("heading", name="What the prompt is like").wait_for()


def take_all(site: Site, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    cluster = measured_model(site, "measured-here")
    model_with_history(site, "changed-lately")
    site.proxy.admin("PATCH", "/admin/models/changed-lately", {"paused": True})
    site.proxy.admin("PUT", "/admin/settings", {"lambda": 0.05})
    parts = {
        "history": ("/model?name=changed-lately", "#history"),
        "answers": (f"/cluster?id={cluster}", "details[open]"),
    }
    with open_browser() as browser:
        for width in WIDTHS:
            for scheme in SCHEMES:
                with browser.new_context(
                    viewport={"width": width, "height": 800}, color_scheme=scheme, device_scale_factor=1
                ) as context:
                    page = context.new_page()
                    page.goto(f"{site.url}/login")
                    page.screenshot(path=folder / f"login-{width}-{scheme}.png")
                    log_in(page, site)
                    for name, path in PAGES.items():
                        open_view(page, site, path)
                        page.wait_for_timeout(400)
                        page.screenshot(path=folder / f"{name}-{width}-{scheme}.png", full_page=True)
                    for name, (path, part) in parts.items():
                        open_view(page, site, path)
                        if name == "answers":
                            page.get_by_text("Answers of 1 model").first.click()
                        page.evaluate("part => document.querySelector(part).scrollIntoView()", part)
                        page.screenshot(path=folder / f"{name}-{width}-{scheme}.png")
                    explain(page, site)
                    page.screenshot(path=folder / f"explain-{width}-{scheme}.png", full_page=True)


def main() -> None:
    folder = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as data, open_site(Path(data), CACHE) as site, traffic(site):
        grade(site)
        Event().wait(float(sys.argv[2]) if len(sys.argv) > 2 else 30)
        take_all(site, folder)


if __name__ == "__main__":
    main()
