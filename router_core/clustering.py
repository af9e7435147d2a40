from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from router_core.errors import InvalidInput
from router_core.types import Assignment, Doubles, Floats

if TYPE_CHECKING:
    import faiss


def kmeans(vectors: Floats, clusters: int, *, seed: int = 0, spherical: bool = True, iterations: int = 25) -> Floats:
    """Fit (K, d) centroids to (n, d) vectors by FAISS, which samples 256 vectors per cluster when n is large.

    `spherical`: by cosine, and of unit length as the vectors are.

    Raises:
        InvalidInput: fewer distinct vectors than clusters.
    """
    import faiss

    distinct = len(np.unique(vectors, axis=0))
    if not 1 <= clusters <= distinct:
        raise InvalidInput(f"{clusters} clusters cannot be fitted to {distinct} distinct prompts; ask for fewer")
    fitting = faiss.Kmeans(
        vectors.shape[1],
        clusters,
        niter=iterations,
        nredo=3,
        seed=seed,
        spherical=spherical,
        min_points_per_centroid=1,
        verbose=False,
    )
    fitting.train(np.ascontiguousarray(vectors, dtype=np.float32))
    return np.asarray(fitting.centroids, dtype=np.float32)


MAX_CLUSTERS_FOR_OVERLAP = 256
"""Clusters up to which a map keeps how they overlap: the matrix, and all that is computed with it, grows with K²."""

_ROWS = 4096
"""Prompts that are laid out densely at once."""


@dataclass(frozen=True, eq=False)
class ReferenceModels:
    """How a map's K clusters share prompts, and what R known models got wrong in each.

    The known models are never routed to. They tell how hard the clusters are and how much models differ, so that the
    few answers of a new one go further.
    """

    overlap: Doubles
    """(K, K) Σ_j w_jk·w_jl / √(n_k·n_l) over the prompts, n_k = Σ_j w_jk; a hard assignment gives the identity."""
    models: tuple[str, ...]
    error_sums: Doubles
    """(R, K)"""
    labels: Doubles
    """(R, K)"""

    def __post_init__(self) -> None:
        clusters = len(self.overlap)
        if self.overlap.shape != (clusters, clusters):
            raise InvalidInput(f"an overlap must be a square matrix; got shape {self.overlap.shape}")
        if not self.error_sums.shape == self.labels.shape == (len(self.models), clusters):
            raise InvalidInput(f"a history of {len(self.models)} models must have as many rows, of {clusters} clusters")
        arrays = (self.overlap, self.error_sums, self.labels)
        if not all(np.isfinite(array).all() and (array >= 0).all() for array in arrays):
            raise InvalidInput("the numbers of a history must be finite and 0 or more")


def reference_models_of(
    assignment: Assignment, clusters: int, scores: Doubles, models: Sequence[str]
) -> ReferenceModels:
    """What n prompts tell: (n, R) scores in [0, 1] of R models, NaN where unlabelled."""
    together = np.zeros((clusters, clusters))
    error_sums, labels = np.zeros((2, len(models), clusters))
    for start in range(0, len(assignment), _ROWS):
        rows = slice(start, start + _ROWS)
        weights = Assignment(assignment.ids[rows], assignment.weights[rows]).dense(clusters)
        labelled = ~np.isnan(scores[rows])
        together += weights.T @ weights
        labels += labelled.T.astype(np.float64) @ weights
        error_sums += np.where(labelled, 1.0 - scores[rows], 0.0).T @ weights
    mass = together.sum(axis=1)
    overlap = np.divide(together, np.sqrt(np.outer(mass, mass)), out=np.eye(clusters), where=np.outer(mass, mass) > 0)
    return ReferenceModels(overlap, tuple(models), error_sums, labels)


class LearnedClusters(Protocol):
    """K clusters of prompts, read off the embedding. A dataclass of arrays and `top`."""

    @property
    def top(self) -> int:
        """How many clusters share a prompt."""

    @property
    def size(self) -> int: ...

    @property
    def dimension(self) -> int: ...

    def assign(self, vectors: Floats) -> Assignment:
        """The `top` clusters of each row of `vectors`, (n, d)."""

    def likeness(self) -> Doubles:
        """(K, K) how alike two clusters are before anything is measured, 1 on the diagonal."""


def array_names(kind: type[Any]) -> tuple[str, ...]:
    """The fields of a kind that are arrays."""
    return tuple(field.name for field in fields(kind) if field.name != "top")


def to_arrays(clusters: LearnedClusters) -> dict[str, NDArray[Any]]:
    return {name: getattr(clusters, name) for name in array_names(type(clusters))}


TOP = 8

TEMPERATURE = 0.05

SPREAD = 0.4
"""Cosine distance over which two clusters cease to be alike, before anything is measured."""


class ClusterMap:
    """K centroids on the unit sphere, and what is known of them. Fitting, profiling and serving go through `assign`."""

    def __init__(
        self,
        centroids: Floats,
        *,
        embedder_id: str,
        names: Sequence[str] = (),
        top: int = TOP,
        temperature: float = TEMPERATURE,
        learned_clusters: Sequence[LearnedClusters] = (),
        reference_models: ReferenceModels | None = None,
    ) -> None:
        """
        Args:
            centroids: (K, d) float32, rows of unit length.
            embedder_id: the embedder whose vectors these are; others are refused by whoever joins the two.
            names: a short name per cluster, for people; those of the taught clusters last.
            top: p, how many clusters share a prompt. 1 is the hard assignment of the paper.
            temperature: τ of the softmax over cosines.
            learned_clusters: groups of further clusters, fitted to known models' errors. A prompt then belongs in equal
                shares to the centroids and to each of these groups.
            reference_models: sums of known models over all clusters, the learned ones last.
        """
        if centroids.ndim != 2 or not len(centroids):
            raise InvalidInput(f"centroids must be a (K, d) matrix; got shape {centroids.shape}")
        if top < 1 or not temperature > 0:
            raise InvalidInput(f"top must be 1 or more and temperature above 0; got {top} and {temperature}")
        self.centroids = np.ascontiguousarray(centroids, dtype=np.float32)
        self.centroids.setflags(write=False)
        self.embedder_id = embedder_id
        self.learned_clusters = tuple(learned_clusters)
        self.reference_models = reference_models
        self.names = tuple(names) or tuple(f"cluster {k}" for k in range(self.size))
        self.top = min(top, len(centroids))
        self.temperature = temperature
        self._check()

    @property
    def size(self) -> int:
        """How many clusters there are, the taught ones included."""
        return self._ends[-1]

    @property
    def dimension(self) -> int:
        return int(self.centroids.shape[1])

    @cached_property
    def id(self) -> str:
        """Digest of all that decides an assignment. Names and history are not part of it."""
        digest = hashlib.sha256(self.centroids.tobytes())
        digest.update(f"{self.centroids.shape} {self.embedder_id} {self.top} {self.temperature!r}".encode())
        for clusters in self.learned_clusters:
            for array in to_arrays(clusters).values():
                digest.update(array.tobytes())
            digest.update(f"{type(clusters).__name__} {clusters.size} {clusters.top}".encode())
        return digest.hexdigest()[:16]

    @cached_property
    def views(self) -> tuple[View, ...]:
        """The groups of clusters that each hold the same share of every prompt."""
        centroids = self.centroids.astype(np.float64)
        alike = [
            np.exp((centroids @ centroids.T - 1.0) / SPREAD),
            *(clusters.likeness() for clusters in self.learned_clusters),
        ]
        share = 1.0 / len(alike)
        starts = (0, *self._ends[:-1])
        return tuple(
            View(slice(start, end), share, likeness)
            for start, end, likeness in zip(starts, self._ends, alike, strict=True)
        )

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        """Where each group of clusters ends."""
        return tuple(accumulate((len(self.centroids), *(clusters.size for clusters in self.learned_clusters))))

    @cached_property
    def _index(self) -> faiss.IndexFlatIP:
        import faiss

        index = faiss.IndexFlatIP(self.dimension)
        index.add(self.centroids)
        return index

    def assign(self, vectors: Floats) -> Assignment:
        """Weights ∝ exp(cos/τ) over the p nearest clusters of each row of `vectors`, (n, d) and of unit length."""
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        cosines, ids = self._index.search(vectors, self.top)
        weights = np.exp((cosines - cosines[:, :1]) / self.temperature)
        near = Assignment(ids=ids, weights=weights / weights.sum(axis=1, keepdims=True))
        if not self.learned_clusters:
            return near
        return _joined([near, *(clusters.assign(vectors) for clusters in self.learned_clusters)], (0, *self._ends[:-1]))

    def with_hard_assignment(self) -> ClusterMap:
        """The same centroids, each prompt wholly in its nearest: another map with another id, without history."""
        return ClusterMap(
            self.centroids,
            embedder_id=self.embedder_id,
            names=self.names[: len(self.centroids)],
            top=1,
            temperature=self.temperature,
        )

    def with_reference_models(self, reference_models: ReferenceModels) -> ClusterMap:
        """The same map, with the same id."""
        return ClusterMap(
            self.centroids,
            embedder_id=self.embedder_id,
            names=self.names,
            top=self.top,
            temperature=self.temperature,
            learned_clusters=self.learned_clusters,
            reference_models=reference_models,
        )

    def _check(self) -> None:
        if len(self.names) != self.size:
            raise InvalidInput(f"{len(self.names)} names for {self.size} clusters")
        for clusters in self.learned_clusters:
            if clusters.dimension != self.dimension:
                raise InvalidInput(f"taught clusters of {clusters.dimension} dimensions, not {self.dimension}")
        if self.reference_models and len(self.reference_models.overlap) != self.size:
            raise InvalidInput(f"a history of {len(self.reference_models.overlap)} clusters for {self.size}")


@dataclass(frozen=True, eq=False)
class View:
    """Clusters that together hold a share of every prompt."""

    columns: slice
    share: float
    likeness: Doubles
    """(k, k) how alike two of them are before anything is measured; 1 on the diagonal."""


def _joined(parts: Sequence[Assignment], starts: Sequence[int]) -> Assignment:
    """An equal share of the prompt by each, heaviest cluster first."""
    ids = np.concatenate([part.ids + start for part, start in zip(parts, starts, strict=True)], axis=1)
    weights = np.asarray(np.concatenate([part.weights for part in parts], axis=1) / np.float32(len(parts)), np.float32)
    order = np.argsort(-weights, axis=1, kind="stable")
    return Assignment(np.take_along_axis(ids, order, axis=1), np.take_along_axis(weights, order, axis=1))
