"""Fixtures of every folder: the embedding table, a real Valkey, a client of upstreams, a certificate."""

from __future__ import annotations

import fcntl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from proxy.settings.schema import Settings
from proxy.storage.redis import Store
from proxy.storage.valkey import EmbeddedValkey
from proxy.upstream.client import UpstreamClient
from router_core.artifact import builtin_map
from router_core.clustering import ClusterMap
from router_core.embedding import StaticEmbedder, static_embedder
from tests.support.relaying import KEY
from tests.support.tls import a_certificate

CACHE = Path(__file__).parent.parent / ".cache" / "embedder"


@pytest.fixture(scope="session")
def embedder_cache() -> Path:
    """A cache folder with the distilled table in it, to hand to whatever opens an embedder."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        static_embedder(CACHE)
    return CACHE


@pytest.fixture(scope="session")
def embedder(embedder_cache: Path) -> StaticEmbedder:
    return static_embedder(embedder_cache)


@pytest.fixture(scope="session")
def cluster_map() -> ClusterMap:
    return builtin_map()


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
