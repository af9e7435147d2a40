"""What every room's tests share: the distilled embedding table, made once per checkout."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from router_core.artifact import builtin_map
from router_core.clustering import ClusterMap
from router_core.embedding import StaticEmbedder, static_embedder

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
