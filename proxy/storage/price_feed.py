from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

import httpx

from proxy.settings.outbound import OutboundConnectError, async_http_client
from proxy.settings.schema import Settings
from proxy.storage.price_map import InvalidPriceMap, PriceMap, bundled_price_map, parse_price_map
from proxy.storage.records import CurrentPrice, ModelRecord
from proxy.storage.redis import Store, StoreUnavailable
from proxy.storage.registry import Registry, UnknownModel
from proxy.storage.snapshot import SnapshotWatcher
from router_core.documents import MAX_PRICES_BYTES, parse_json
from router_core.types import Price

log = logging.getLogger("uniroute.prices")

FEED_TIMEOUT_S = 15.0

# Held by the process that reads the feed this time.
LEADER_LOCK = "uniroute:pricing-feed"

MIN_INTERVAL_S = 1.0


class PricedState(Protocol):
    """What the feed needs of a RoutingSnapshot."""

    @property
    def models(self) -> Mapping[str, ModelRecord]: ...

    @property
    def prices(self) -> Mapping[str, CurrentPrice]: ...


class PriceFeedError(Exception):
    """The feed could not be read or is no price map. Every price stays as it was."""


@dataclass(frozen=True)
class SyncReport:
    """What a reading of the feed has changed, by model name."""

    source: str
    updated: Mapping[str, Price] = field(default_factory=dict)
    unchanged: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    """Priced by an administrator or another writer; for the bundled map, also by model_info."""
    unknown: tuple[str, ...] = ()
    """Not in the feed, or there without a price."""

    def to_json(self) -> dict[str, object]:
        prices = {name: price.to_fields() for name, price in self.updated.items()}
        lists = {name: list(getattr(self, name)) for name in ("unchanged", "kept", "unknown")}
        return {"source": self.source, "updated": prices, **lists}


async def sync_prices(registry: Registry, state: PricedState, url: str | None = None) -> SyncReport:
    """Store the feed's prices of the registered models. `url` None: the map that the installed litellm carries.

    Raises:
        PriceFeedError: nothing was changed.
        StoreUnavailable: a part may have been stored; repeat it.
    """
    price_map = bundled_price_map() if url is None else await fetch_price_map(url)
    outcomes: dict[str, list[str]] = {"updated": [], "unchanged": [], "kept": [], "unknown": []}
    listed = {
        name: _listed(price_map, record, by_name=url is not None)
        for name, record in state.models.items()
        if record.base is None  # an effort has the price of its model
    }
    for name, price in sorted(listed.items()):
        outcomes[await _synced(registry, state, name, price, bundled=url is None)].append(name)
    updated = {name: price for name in outcomes.pop("updated") if (price := listed[name])}
    return SyncReport(_shown(url), updated, **{kind: tuple(names) for kind, names in outcomes.items()})


async def _synced(registry: Registry, state: PricedState, name: str, price: Price | None, *, bundled: bool) -> str:
    """Store a price if it may be; return the list of the report to which the model belongs."""
    now = state.prices.get(name)
    if price is None:
        return "unknown"
    if not _may_change(now, state.models[name], bundled=bundled) or not await _stored(registry, name, price):
        return "kept"
    return "unchanged" if now and now.price == price else "updated"


async def fetch_price_map(url: str) -> PriceMap:
    """Read a price map. Raise PriceFeedError: not reached, a redirect, an error status, too large, or no price map."""
    try:
        return parse_price_map(parse_json(await _fetch(url)))
    except OutboundConnectError as error:
        raise PriceFeedError(f"the price feed cannot be read: {error}") from error
    except (httpx.HTTPError, TimeoutError) as error:
        raise PriceFeedError(f"the price feed cannot be read: {type(error).__name__} {error}") from error
    except (httpx.InvalidURL, InvalidPriceMap, ValueError) as error:
        raise PriceFeedError(f"the price feed is refused, prices stay as they are: {error}") from error


async def _fetch(url: str) -> bytes:
    body = bytearray()
    async with (
        asyncio.timeout(2 * FEED_TIMEOUT_S),
        async_http_client(timeout=FEED_TIMEOUT_S) as client,
        client.stream("GET", url) as response,
    ):
        if response.status_code != httpx.codes.OK:
            raise PriceFeedError(
                f"the price feed answered with status {response.status_code}; redirects are not followed"
            )
        async for piece in response.aiter_bytes():
            body += piece
            if len(body) > MAX_PRICES_BYTES:
                raise PriceFeedError(f"the price feed is larger than {MAX_PRICES_BYTES} bytes")
    return bytes(body)


class PriceFeed:
    """Read the feed every `price_refresh_minutes`, in one process at a time."""

    def __init__(self, settings: Settings, store: Store, registry: Registry, state: SnapshotWatcher) -> None:
        self._period_s = settings.price_refresh_minutes * 60
        self._url = settings.price_url
        self._store = store
        self._registry = registry
        self._state = state

    async def run(self) -> None:
        """Read until cancelled; return at once if no feed is wanted. Log a failure and try again next time."""
        if self._period_s <= 0:
            return
        while True:
            try:
                if await self._acquire_lock():
                    report = await sync_prices(self._registry, self._state.current, self._url)
                    log.info("price feed %s: %d prices changed", report.source, len(report.updated))
            except (PriceFeedError, StoreUnavailable) as error:
                log.warning("%s", error)
            await asyncio.sleep(min(self._period_s, max(MIN_INTERVAL_S, self._period_s / 4)))

    async def _acquire_lock(self) -> bool:
        async with self._store.operation("read the price feed") as client:
            return bool(await client.set(LEADER_LOCK, "1", nx=True, px=max(1, int(self._period_s * 1000))))


def _listed(price_map: PriceMap, record: ModelRecord, *, by_name: bool) -> Price | None:
    """Find the price by litellm's name or, in a feed of one's own, by the registered name."""
    names = [str(record.litellm_params["model"]), *([record.name] if by_name else [])]
    found = (price_map.find(name) for name in names)
    return next((entry.price for entry in found if entry and entry.price), None)


def _may_change(price: CurrentPrice | None, record: ModelRecord, *, bundled: bool) -> bool:
    """Return whether the feed may set this price.

    `free: true` says something of the machine, and stays. A price in model_info gives way to a feed, and not to the
    bundled map.
    """
    if record.info.free:
        return False
    return price is None or price.source in ("sync", "litellm") or (price.source == "model_info" and not bundled)


async def _stored(registry: Registry, name: str, price: Price) -> bool:
    """Store a price; return False if it was set elsewhere meanwhile, or if the model is gone."""
    try:
        return await registry.put_price(name, price, "sync") is not None
    except UnknownModel:
        return False


def _shown(url: str | None) -> str:
    """Return the source of the prices, without what may be a secret."""
    if url is None:
        return "litellm"
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"
