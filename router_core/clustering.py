"""Φ: unit vectors to weights over clusters, and the fitting of the centroids. Texts and files are elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from router_core.errors import InvalidInput
from router_core.types import Assignment, Floats

if TYPE_CHECKING:
    import faiss

TOP = 8
TEMPERATURE = 0.05


class ClusterMap:
    """K centroids on the unit sphere. Fitting, profiling and serving all go through `assign`."""

    def __init__(
        self,
        centroids: Floats,
        *,
        embedder_id: str,
        names: Sequence[str] = (),
        top: int = TOP,
        temperature: float = TEMPERATURE,
    ) -> None:
        """
        Args:
            centroids: (K, d) float32, rows of unit length.
            embedder_id: the embedder whose vectors these are; others are refused by whoever joins the two.
            names: a short name per cluster, for people.
            top: p, how many clusters share a prompt. 1 is the hard assignment of the paper.
            temperature: τ of the softmax over cosines.
        """
        if centroids.ndim != 2 or not len(centroids):
            raise InvalidInput(f"centroids must be a (K, d) matrix; got shape {centroids.shape}")
        if top < 1 or not temperature > 0:
            raise InvalidInput(f"top must be 1 or more and temperature above 0; got {top} and {temperature}")
        self.centroids = np.ascontiguousarray(centroids, dtype=np.float32)
        self.centroids.setflags(write=False)
        self.embedder_id = embedder_id
        self.names = tuple(names) or tuple(f"cluster {k}" for k in range(len(centroids)))
        self.top = min(top, len(centroids))
        self.temperature = temperature
        if len(self.names) != len(centroids):
            raise InvalidInput(f"{len(self.names)} names for {len(centroids)} clusters")

    @property
    def size(self) -> int:
        """K."""
        return len(self.centroids)

    @property
    def dimension(self) -> int:
        return int(self.centroids.shape[1])

    @cached_property
    def id(self) -> str:
        """Digest of all that decides an assignment. Names are not part of it."""
        digest = hashlib.sha256(self.centroids.tobytes())
        digest.update(f"{self.centroids.shape} {self.embedder_id} {self.top} {self.temperature!r}".encode())
        return digest.hexdigest()[:16]

    @cached_property
    def _index(self) -> faiss.IndexFlatIP:
        import faiss

        index = faiss.IndexFlatIP(self.dimension)
        index.add(self.centroids)
        return index

    def assign(self, vectors: Floats) -> Assignment:
        """Weights ∝ exp(cos/τ) over the p nearest clusters of each row of `vectors`, (n, d) and of unit length."""
        cosines, ids = self._index.search(np.ascontiguousarray(vectors, dtype=np.float32), self.top)
        weights = np.exp((cosines - cosines[:, :1]) / self.temperature)
        return Assignment(ids=ids, weights=weights / weights.sum(axis=1, keepdims=True))

    def hardened(self) -> ClusterMap:
        """The same clusters, each prompt wholly in its nearest: another map, with another id."""
        return ClusterMap(
            self.centroids, embedder_id=self.embedder_id, names=self.names, top=1, temperature=self.temperature
        )


def spherical_kmeans(vectors: Floats, clusters: int, *, seed: int = 0, iterations: int = 25) -> Floats:
    """Fit (K, d) unit centroids to (n, d) unit vectors by FAISS, which samples 256 vectors per cluster when n is large.

    Raises:
        InvalidInput: fewer distinct vectors than clusters.
    """
    import faiss

    distinct = len(np.unique(vectors, axis=0))
    if not 1 <= clusters <= distinct:
        raise InvalidInput(f"{clusters} clusters cannot be fitted to {distinct} distinct prompts; ask for fewer")
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        clusters,
        niter=iterations,
        nredo=3,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        verbose=False,
    )
    kmeans.train(np.ascontiguousarray(vectors, dtype=np.float32))
    return np.asarray(kmeans.centroids, dtype=np.float32)
