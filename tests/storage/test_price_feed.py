from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from proxy.cli.models import sync_once
from proxy.concurrency import cancel_and_wait
from proxy.settings.schema import Settings
from proxy.storage.price_feed import PriceFeed, PriceFeedError, fetch_price_map, sync_prices
from proxy.storage.redis import Store
from router_core.documents import MAX_PRICES_BYTES
from router_core.types import Price
from tests.support.makers import a_record, a_registry, started_watcher
from tests.support.waiting import until

FEED = {"openai/small": {"litellm_provider": "openai", "input_cost_per_token": 5e-7, "output_cost_per_token": 9e-7}}


@contextmanager
def a_feed(body: bytes | object, status: int = 200, location: str | None = None) -> Iterator[str]:
    """Serve one answer over real HTTP, and yield its URL."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            if location:
                self.send_header("location", location)
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/prices.json"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


async def test_a_feed_prices_the_models_it_knows_and_says_which(store: Store, tmp_path: Path) -> None:
    records = [a_record(name, source="config", info={}) for name in ("small", "stranger")]
    registry = a_registry(store, tmp_path, "small", "stranger")
    async with started_watcher(store, tmp_path, *records) as holder:
        with a_feed(FEED) as url:
            report = await sync_prices(registry, holder.current, url)
            await until(lambda: "small" in holder.current.prices)
            again = await sync_prices(registry, holder.current, url)
        assert report.updated == {"small": Price(5e-7, 9e-7)}
        assert report.unknown == ("stranger",)
        assert again.unchanged == ("small",)
        assert holder.current.prices["small"].source == "sync"
        assert "stranger" not in holder.current.prices


async def test_a_feed_of_ones_own_may_list_registered_names(store: Store, tmp_path: Path) -> None:
    record = a_record("mine", source="config", info={}, model="openai/deployment-7")
    async with started_watcher(store, tmp_path, record) as holder:
        with a_feed({"mine": FEED["openai/small"] | {"litellm_provider": "us"}}) as url:
            report = await sync_prices(a_registry(store, tmp_path, "mine"), holder.current, url)
    assert set(report.updated) == {"mine"}


async def test_prices_of_other_sources_stay(store: Store, tmp_path: Path) -> None:
    free = a_record("free", source="config", info={"free": True}, model="openai/small")
    small = a_record(source="config")
    registry = a_registry(store, tmp_path, "small", "free")
    async with started_watcher(store, tmp_path, small, free) as holder:
        await registry.put_price("small", Price(1e-6, 1e-6), "admin")
        await holder.refresh()
        with a_feed(FEED) as url:
            report = await sync_prices(registry, holder.current, url)
        await holder.refresh()
        assert set(report.kept) == {"free", "small"}
        assert holder.current.prices["small"].price == Price(1e-6, 1e-6)


async def test_a_price_set_while_the_feed_is_read_stays(store: Store, tmp_path: Path) -> None:
    registry = a_registry(store, tmp_path, "small")
    async with started_watcher(store, tmp_path, a_record(source="config")) as holder:
        before = holder.current
        await registry.put_price("small", Price(1e-6, 1e-6), "admin")
        with a_feed(FEED) as url:
            assert (await sync_prices(registry, before, url)).kept == ("small",)


async def test_model_info_yields_to_a_feed_but_not_to_the_bundled_map(store: Store, tmp_path: Path) -> None:
    record = a_record(source="config", model="openai/gpt-4o")
    registry = a_registry(store, tmp_path, "small")
    async with started_watcher(store, tmp_path, record) as holder:
        assert (await sync_prices(registry, holder.current)).kept == ("small",)
        with a_feed({"gpt-4o": FEED["openai/small"]}) as url:
            assert set((await sync_prices(registry, holder.current, url)).updated) == {"small"}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 200, "refused"),
        (b"[" * 100_000, 200, "refused"),
        ({}, 200, "refused"),
        ({**FEED, "x": {"input_cost_per_token": -1, "output_cost_per_token": 0}}, 200, "refused"),
        ({**FEED, "x": {"input_cost_per_token": 10**400, "output_cost_per_token": 0}}, 200, "refused"),
        ({**FEED, "x": {"input_cost_per_token": 1e300, "output_cost_per_token": 0}}, 200, "refused"),
        (b"<html>busy</html>", 200, "refused"),
        (FEED, 500, "status 500"),
        (FEED, 302, "redirects are not followed"),
        (b" " * (MAX_PRICES_BYTES + 1), 200, "larger than"),
    ],
)
async def test_a_broken_feed_changes_no_price(body: object, status: int, message: str) -> None:
    with a_feed(body, status, location="http://127.0.0.1:9/") as url, pytest.raises(PriceFeedError, match=message):
        await fetch_price_map(url)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/none", "file:///etc/passwd", "http://[", ""])
async def test_an_unreachable_feed_is_a_clear_error(url: str) -> None:
    with pytest.raises(PriceFeedError, match="price feed"):
        await fetch_price_map(url)


async def test_the_feed_is_read_again_after_it_was_broken(store: Store, tmp_path: Path) -> None:
    registry = a_registry(store, tmp_path, "small")
    async with started_watcher(store, tmp_path, a_record(source="config", info={})) as holder:
        with a_feed(FEED) as url:
            settings = Settings(data_dir=tmp_path, price_refresh_minutes=1, price_url=url)
            feed = asyncio.create_task(PriceFeed(settings, store, registry, holder).run())
            await until(lambda: "small" in holder.current.prices)
            assert not await PriceFeed(settings, store, registry, holder)._acquire_lock()
            await cancel_and_wait(feed)
        assert holder.current.prices["small"].source == "sync"


async def test_the_command_prices_configured_and_stored_models_of_a_running_server(
    store: Store, tmp_path: Path
) -> None:
    entry = {"model_name": "mine", "litellm_params": {"model": "openai/small"}}
    await a_registry(store, tmp_path).add_model(a_record(info={}))
    async with started_watcher(store, tmp_path) as holder:
        with a_feed(FEED) as url:
            settings = Settings.model_validate({"data_dir": tmp_path, "redis_url": store.url, "model_list": [entry]})
            report = await sync_once(settings, url)
        assert set(report.updated) == {"mine", "small"}
        await until(lambda: "small" in holder.current.prices)
    assert report.to_json()["unknown"] == []
