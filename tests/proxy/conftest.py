"""A real Valkey for the session on a unix socket, emptied before each test; the way to models; a certificate."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from proxy.settings.schema import Settings
from proxy.storage.redis import Store
from proxy.storage.valkey import EmbeddedValkey
from proxy.upstream.client import UpstreamClient
from tests.support.relaying import KEY
from tests.support.tls import a_certificate


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    server = EmbeddedValkey(tmp_path_factory.mktemp("store"))
    server.ensure()
    yield server
    server.stop()


@pytest.fixture
async def store(valkey: EmbeddedValkey) -> AsyncIterator[Store]:
    opened = Store(f"unix://{valkey.socket_path}")
    await opened.client.flushall()
    yield opened
    await opened.close()


@pytest.fixture
async def second_store(store: Store) -> AsyncIterator[Store]:
    """Another process's connection to the same server."""
    opened = Store(store.url)
    yield opened
    await opened.close()


@pytest.fixture
async def upstream() -> AsyncIterator[UpstreamClient]:
    opened = UpstreamClient(Settings(), {"ARM_API_KEY": KEY})
    yield opened
    await opened.aclose()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_certificate(tmp_path_factory.mktemp("tls"))
