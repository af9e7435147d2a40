"""What has to be known of the store before anything listens, and keeping an embedded one for several workers."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from proxy.settings.schema import Settings, check_exposure, is_loopback
from proxy.storage.client_keys import KeyLatch
from proxy.storage.redis import Store, StoreUnavailable
from proxy.storage.registry import Registry
from proxy.storage.valkey import EmbeddedStoreFailed, EmbeddedValkey


def check_open_door(settings: Settings) -> None:
    """Refuse to listen to others while no client key exists. On loopback nothing is asked.

    Raises:
        SettingsError: the server would be open to everybody.
        StoreUnavailable: the embedded store does not start.
    """
    latch = KeyLatch(settings.data_dir)
    if not (is_loopback(settings.host) or latch.closed):
        asyncio.run(_look_for_keys(settings, latch))
        check_exposure(settings, keys_required=latch.closed)


async def _look_for_keys(settings: Settings, latch: KeyLatch) -> None:
    """A store that does not answer counts as one without keys."""
    store = await Store.open(settings)
    try:
        with contextlib.suppress(StoreUnavailable):
            if await Registry(store, (), latch).keys.listed():
                latch.close()
    finally:
        await store.close()


@contextmanager
def kept_store(settings: Settings) -> Iterator[None]:
    """Use the embedded store, if that is the one, so that it outlives workers that die. They start it themselves."""
    if settings.redis_url:
        yield
        return
    embedded = EmbeddedValkey(settings.data_dir)
    joining = threading.Thread(target=_join, args=(embedded,), name="uniroute-store")
    joining.start()
    try:
        yield
    finally:
        embedded.closing = True
        joining.join()
        embedded.stop()


def _join(embedded: EmbeddedValkey) -> None:
    with contextlib.suppress(EmbeddedStoreFailed):  # the workers find out, and say so
        embedded.ensure()
