"""One reading of the price feed from outside the server: what `uniroute prices sync` does. Serves nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from proxy.settings.schema import Settings
from proxy.storage.audit_log import CLI
from proxy.storage.client_keys import KeyLatch
from proxy.storage.models import LivePrice, ModelRecord
from proxy.storage.price_feed import SyncReport, sync_prices
from proxy.storage.price_map import bundled_catalog
from proxy.storage.reader import Stored, StoredReader
from proxy.storage.redis import Store
from proxy.storage.registry import Registry
from proxy.storage.snapshot import prices_of


@dataclass(frozen=True)
class PricedModels:
    models: Mapping[str, ModelRecord]
    prices: Mapping[str, LivePrice]


async def sync_once(settings: Settings, url: str | None = None) -> SyncReport:
    """Price the configured and the stored models from `url`, else `price_url`, else the map that litellm carries.

    Serving processes use the new prices within a second.

    Raises:
        FeedFailed, StoreUnavailable: nothing was changed, or what was not stored yet is not.
    """
    store = await Store.open(settings)
    try:
        configured = {entry.model_name: ModelRecord.of_entry(entry, "config", 0.0) for entry in settings.model_list}
        reader = StoredReader(store, time.time)
        await reader.read(configured)
        registry = Registry(store, configured, KeyLatch(settings.data_dir), CLI)
        return await sync_prices(registry, _priced(reader.last, configured), url or settings.price_url)
    finally:
        await store.close()


def _priced(stored: Stored, configured: Mapping[str, ModelRecord]) -> PricedModels:
    models = {**stored.models, **configured}
    catalog = bundled_catalog()
    known = {name: catalog.find(str(record.litellm_params["model"])) for name, record in models.items()}
    return PricedModels(models, prices_of(models, stored, known))
