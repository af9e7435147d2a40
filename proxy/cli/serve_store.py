"""What is done once, before any process serves: the embedding table, the store, the open door. Serves nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from proxy.cli import console
from proxy.settings import Settings, SettingsError, check_exposure
from proxy.state.keys import KeyLatch
from proxy.state.registry import Registry
from proxy.state.store import Store, StoreUnavailable


@contextmanager
def owned_store(settings: Settings, announce: Callable[[str], None]) -> Iterator[None]:
    """Keeps an embedded store running for all processes. `announce` is told of steps that take seconds.

    Raises:
        SettingsError: the server would be open to everybody.
        StoreUnavailable: the embedded store does not start.
    """
    store = asyncio.run(_checked_store(settings))
    try:
        _embedding_table(settings, announce)
        yield
    finally:
        if store.embedded is not None:
            store.embedded.stop()


def _embedding_table(settings: Settings, announce: Callable[[str], None]) -> None:
    """Worker processes find it made, instead of making it each."""
    if settings.embedder == "static":
        from router_core.embedding import static_embedder

        with console.progress() as bars:
            static_embedder(settings.data_dir, announce, lambda done, total: bars.update("tokens", done, total))


async def _checked_store(settings: Settings) -> Store:
    store = await Store.open(settings)
    try:
        check_exposure(settings, keys_required=await _keys_required(store, settings))
    except SettingsError:
        await store.close()
        raise
    await store.client.aclose()
    return store


async def _keys_required(store: Store, settings: Settings) -> bool:
    """A store that does not answer counts as one without keys: the local latch decides."""
    latch = KeyLatch(settings.data_dir)
    if not latch.closed:
        with contextlib.suppress(StoreUnavailable):
            if await Registry(store, (), latch).keys.listed():
                latch.close()
    return latch.closed
