"""Fixtures of every folder: the embedding table, a real Valkey, a client of upstreams, a certificate."""

from __future__ import annotations

import fcntl
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from proxy.settings.schema import Settings
from proxy.storage.redis import Store
from proxy.storage.valkey import EmbeddedValkey
from proxy.upstream.client import UpstreamClient
from router_core.artifact import builtin_map
from router_core.clustering import ClusterMap
from router_core.embedding import StaticEmbedder, static_embedder
from tests.support.direct_calls import KEY
from tests.support.program import fork_servers
from tests.support.reaper import Reaper
from tests.support.tls import a_certificate, share_tls_contexts
from tests.support.waiting import wait_patiently_for_answers

# A deadline for each example, and for making it, would be a bound on time.
settings.register_profile("uniroute", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("uniroute")

TESTS = Path(__file__).parent
CACHE = TESTS.parent / ".cache" / "embedder"


# The longest files, which are begun first: a worker that gets one at the end keeps the others waiting.
LONGEST = (
    "attacks/test_openapi.py",
    "faults/test_processes.py",
    "server/test_litellm_loading.py",
    "attacks/test_canaries.py",
    "bench/test_overhead.py",
    "cli/test_launch.py",
    "upstream/test_native_reader_properties.py",
    "server/test_startup.py",
    "acceptance/test_routed_pool.py",
    "faults/test_workers.py",
    "cli/test_signals.py",
    "server/test_odd_store_values.py",
    "acceptance/test_sizes_at_a_limit.py",
    "test_interrupted_runs.py",
)


def pytest_configure(config: pytest.Config) -> None:
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # a shell's background job, and so would be all that it starts
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform == "linux":
        config.add_cleanup(Reaper().close)
        for fork_server in fork_servers.values():
            config.add_cleanup(fork_server.close)
    share_tls_contexts()
    wait_patiently_for_answers()
    config.option.loadscopereorder = False  # xdist would begin with the files of most tests
    assert all((TESTS / name).exists() for name in LONGEST)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {TESTS / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(LONGEST)))


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
    opened = UpstreamClient(Settings(), {"MODEL_API_KEY": KEY})
    yield opened
    await opened.aclose()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_certificate(tmp_path_factory.mktemp("tls"))
