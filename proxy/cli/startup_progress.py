from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import httpx

from proxy.cli import console

POLL_INTERVAL_S = 0.1


def announce_ready(url: str) -> None:
    """Show the progress of a server's start, and say when it is ready, from a thread that ends then."""
    started = time.monotonic()

    def wait() -> None:
        with httpx.Client(trust_env=False, timeout=5) as client, console.progress() as bars:
            while (document := _readiness(client, url)) is not None:
                show_startup(document, bars)
                time.sleep(POLL_INTERVAL_S)
        console.echo_err(f"ready after {time.monotonic() - started:.1f} s; Ctrl-C ends it")

    threading.Thread(target=wait, name="uniroute-announce", daemon=True).start()


def show_startup(document: Mapping[str, Any], bars: console.Progress) -> None:
    """Show the steps of `/readyz` whose length is known."""
    for step in document.get("under_way", ()):
        if step.get("done"):
            bars.update(step["what"], step["done"], step["total"])


def _readiness(client: httpx.Client, url: str) -> dict[str, Any] | None:
    """Return the document of `/readyz` while the server is not ready, and None once it is."""
    try:
        reply = client.get(f"{url}/readyz")
        document = reply.json()
    except (httpx.HTTPError, ValueError):
        return {}
    return None if reply.is_success else document if isinstance(document, dict) else {}
