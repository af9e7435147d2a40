from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from router_core import kernels
from router_core.errors import InvalidInput
from router_core.surface import SURFACE_FEATURES, surface_features
from router_core.text import truncate_middle
from router_core.types import Assignment, Doubles, Embedder, Floats

if TYPE_CHECKING:
    import faiss

DEFAULT_TOP = 8

DEFAULT_TEMPERATURE = 0.05

# Cosine distance over which two clusters cease to be similar, before anything is measured.
SIMILARITY_RANGE = 0.4

# The largest map that keeps how its clusters overlap: the matrix, and all that is computed with it, grows with K².
MAX_CLUSTERS_FOR_OVERLAP = 256

# FAISS finds no neighbour of a vector that holds NaN or infinity.
NOT_FINITE = "the vector of a prompt is not finite, so no cluster is near it"

# Prompts whose weights are laid out densely at once.
_BATCH_SIZE = 4096


def kmeans(vectors: Floats, clusters: int, *, seed: int = 0, spherical: bool = True, iterations: int = 25) -> Floats:
    """Fit (K, d) centroids to (n, d) vectors by FAISS, which samples 256 vectors per cluster if n is large.

    Args:
        spherical: cluster by cosine; the centroids then have unit length, as the vectors must.

    Raises:
        InvalidInput: there are fewer distinct vectors than clusters.
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


@dataclass(frozen=True, eq=False)
class ReferenceModels:
    """How a map's K clusters share prompts, and what R known models got wrong in each.

    The known models are never routed to. They tell how hard the clusters are and how much models differ, so that the
    few answers of a new model say more.
    """

    overlap: Doubles
    """(K, K) Σ_j w_jk·w_jl / √(n_k·n_l) over the prompts j, n_k = Σ_j w_jk; the identity for a hard assignment."""
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
    """Sum up n prompts and the (n, R) scores of R models on them, in [0, 1], NaN where unlabelled."""
    shared = np.zeros((clusters, clusters))
    error_sums, labels = np.zeros((2, len(models), clusters))
    for start in range(0, len(assignment), _BATCH_SIZE):
        rows = slice(start, start + _BATCH_SIZE)
        weights = Assignment(assignment.ids[rows], assignment.weights[rows]).dense(clusters)
        labelled = ~np.isnan(scores[rows])
        shared += weights.T @ weights
        labels += labelled.T.astype(np.float64) @ weights
        error_sums += np.where(labelled, 1.0 - scores[rows], 0.0).T @ weights
    mass = shared.sum(axis=1)
    overlap = np.divide(shared, np.sqrt(np.outer(mass, mass)), out=np.eye(clusters), where=np.outer(mass, mass) > 0)
    return ReferenceModels(overlap, tuple(models), error_sums, labels)


# The share of a map's own prompts that are novel to it: farther from every centroid than all others.
NOVEL_SHARE = 0.01


@dataclass(frozen=True, eq=False)
class FittedPrompts:
    """The prompts that a map was fitted to, as figures: what its traffic is compared with."""

    count: int
    shares: Doubles
    """(K,) how much of them is in each cluster; they sum to one."""
    novel_below: float
    """The cosine with the nearest centroid that all but NOVEL_SHARE of them have."""

    def __post_init__(self) -> None:
        total = float(self.shares.sum())
        if self.shares.ndim != 1 or not (self.shares >= 0).all() or not abs(total - 1.0) < 1e-6:
            raise InvalidInput("the shares of a map's prompts must be 0 or more, and sum to one")
        if self.count < 1 or not -1.0 <= self.novel_below <= 1.0:
            raise InvalidInput(f"{self.count} prompts and the cosine {self.novel_below} are none of a fitted map")

    @classmethod
    def of(cls, assignment: Assignment, clusters: int) -> FittedPrompts:
        """Describe n prompts by their assignment, which must have cosines."""
        assert assignment.cosines is not None
        shares = np.bincount(assignment.ids.ravel(), weights=assignment.weights.ravel(), minlength=clusters)
        novel_below = float(np.clip(np.quantile(assignment.cosines, NOVEL_SHARE), -1.0, 1.0))
        return cls(len(assignment), shares / shares.sum(), novel_below)


class LearnedClusters(Protocol):
    """K further clusters of prompts, computed from the embedding, and the surface features if it has room for them.

    A dataclass of arrays and `top`.
    """

    # Part of the ids of maps, which stored profiles refer to: it must never change.
    digest_name: ClassVar[str]

    @property
    def top(self) -> int:
        """How many clusters share a prompt."""

    @property
    def size(self) -> int: ...

    @property
    def dimension(self) -> int: ...

    def assign(self, vectors: Floats) -> Assignment:
        """Return the `top` clusters of each row of `vectors`, (n, d)."""

    def similarity(self) -> Doubles:
        """Return (K, K) how similar two clusters are before anything is measured; 1 on the diagonal."""


def array_names(kind: type[Any]) -> tuple[str, ...]:
    """Return the names of the fields that are arrays, of a class of LearnedClusters."""
    return tuple(field.name for field in fields(kind) if field.name != "top")


def to_arrays(clusters: LearnedClusters) -> dict[str, NDArray[Any]]:
    return {name: getattr(clusters, name) for name in array_names(type(clusters))}


@dataclass(frozen=True, eq=False)
class ClusterGroup:
    """The clusters of one kind, which together hold the same share of every prompt."""

    columns: slice
    share: float
    similarity: Doubles
    """(k, k) how similar two of them are before anything is measured; 1 on the diagonal."""


class ClusterMap:
    """Φ: K unit centroids, and what is known of their clusters. Fitting, profiling and serving all call `assign`."""

    def __init__(
        self,
        centroids: Floats,
        *,
        embedder_id: str,
        names: Sequence[str] = (),
        top: int = DEFAULT_TOP,
        temperature: float = DEFAULT_TEMPERATURE,
        learned_clusters: Sequence[LearnedClusters] = (),
        reference_models: ReferenceModels | None = None,
        fitted_prompts: FittedPrompts | None = None,
    ) -> None:
        """
        Args:
            centroids: (K, d) float32, rows of unit length.
            embedder_id: the embedder whose vectors these are.
            names: a short name per cluster, for people; those of the learned clusters come last.
            top: p, how many clusters share a prompt. 1 is the hard assignment of the paper.
            temperature: τ of the softmax over cosines.
            learned_clusters: groups of further clusters, fitted to known models' errors. A prompt then belongs in equal
                shares to the centroids and to each of these groups.
            reference_models: sums of known models over all clusters, the learned ones last.
            fitted_prompts: the prompts that the map was fitted to; None: they are not known.
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
        self.fitted_prompts = fitted_prompts
        self.names = tuple(names) or tuple(f"cluster {k}" for k in range(self.size))
        self.top = min(top, len(centroids))
        self.temperature = temperature
        self._check()

    @property
    def size(self) -> int:
        """How many clusters there are, the learned ones included."""
        return self._ends[-1]

    @property
    def dimension(self) -> int:
        return int(self.centroids.shape[1])

    @cached_property
    def reads_surface(self) -> bool:
        """Whether learned clusters read the surface features of a prompt beside its vector."""
        return any(clusters.dimension > self.dimension for clusters in self.learned_clusters)

    def surface_of(self, texts: Sequence[str]) -> Floats | None:
        """Return what `assign` needs of n texts beside their vectors; None if it needs nothing."""
        return surface_features(texts) if self.reads_surface else None

    @property
    def novel_below(self) -> float | None:
        """The cosine with the nearest centroid below which a prompt is novel; None: it is not known."""
        return self.fitted_prompts.novel_below if self.fitted_prompts else None

    @cached_property
    def prompt_shares(self) -> Doubles | None:
        """Return (K,) how the prompts that the map was fitted to spread over the clusters; None: it is not known.

        A map that does not state them has them in the overlap of its clusters: the weights of a prompt sum to one, so
        Σ_l overlap_kl·√n_l = √n_k, and the √n are the eigenvector of the eigenvalue 1, the largest one.
        """
        if self.fitted_prompts is not None:
            return self.fitted_prompts.shares
        if self.reference_models is None:
            return None
        values, vectors = np.linalg.eigh(self.reference_models.overlap)
        # Clusters that share no prompt with the others leave their sizes open.
        if abs(values[-1] - 1.0) > 1e-6 or (len(values) > 1 and values[-2] > 1.0 - 1e-6):
            return None
        return np.asarray(vectors[:, -1] ** 2)

    @cached_property
    def id(self) -> str:
        """A digest of all that decides an assignment: names and what was known of prompts and models are no part."""
        digest = hashlib.sha256(self.centroids.tobytes())
        digest.update(f"{self.centroids.shape} {self.embedder_id} {self.top} {self.temperature!r}".encode())
        for clusters in self.learned_clusters:
            for array in to_arrays(clusters).values():
                digest.update(array.tobytes())
            digest.update(f"{clusters.digest_name} {clusters.size} {clusters.top}".encode())
        return digest.hexdigest()[:16]

    @cached_property
    def groups(self) -> tuple[ClusterGroup, ...]:
        """The centroids' clusters, then each kind of learned clusters."""
        centroids = self.centroids.astype(np.float64)
        similarities = [np.exp((centroids @ centroids.T - 1.0) / SIMILARITY_RANGE)]
        similarities += [clusters.similarity() for clusters in self.learned_clusters]
        share = 1.0 / len(similarities)
        starts = (0, *self._ends[:-1])
        return tuple(
            ClusterGroup(slice(start, end), share, similarity)
            for start, end, similarity in zip(starts, self._ends, similarities, strict=True)
        )

    def assign(self, vectors: Floats, surface: Floats | None = None) -> Assignment:
        """Assign each row of `vectors`, (n, d) and of unit length, to its clusters.

        Weights are proportional to exp(cos/τ) over the `top` nearest centroids.

        Args:
            surface: (n, SURFACE_FEATURES), as `surface_of` returns them; a map that reads none ignores them.

        Raises:
            InvalidInput: the map reads surface features and there are none.
        """
        nearest = self._single.search.assign(vectors) if len(vectors) == 1 else self._assign_many(vectors)
        if not self.learned_clusters:
            return nearest
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if self.reads_surface:
            if surface is None:
                raise InvalidInput("this map reads surface features of prompts, and none are given")
            vectors = np.concatenate((vectors, surface), axis=1)
        assignments = [
            nearest,
            *(clusters.assign(vectors[:, : clusters.dimension]) for clusters in self.learned_clusters),
        ]
        return _join(assignments, (0, *self._ends[:-1]))

    @property
    def query(self) -> Floats:
        """The calling thread's (1, d) vector, which `assign` need not copy if it is written here."""
        return self._single.search.vector

    def _assign_many(self, vectors: Floats) -> Assignment:
        cosines, ids = self._index.search(np.ascontiguousarray(vectors, dtype=np.float32), self.top)
        if (ids < 0).any():
            raise InvalidInput(NOT_FINITE)
        exponents = np.exp((cosines.astype(np.float64) - cosines[:, :1]) / self.temperature)
        weights = np.asarray(exponents / exponents.sum(axis=1, keepdims=True), dtype=np.float32)
        return Assignment(ids, weights, cosines[:, 0].copy())

    def with_hard_assignment(self) -> ClusterMap:
        """Return a map of the same centroids that puts each prompt wholly in the nearest.

        It has another id, and neither learned clusters nor reference models.
        """
        return ClusterMap(
            self.centroids,
            embedder_id=self.embedder_id,
            names=self.names[: len(self.centroids)],
            top=1,
            temperature=self.temperature,
        )

    def with_known(
        self, reference_models: ReferenceModels | None = None, fitted_prompts: FittedPrompts | None = None
    ) -> ClusterMap:
        """Return the same map, with the same id, that knows these models, and the prompts that it was fitted to.

        What is None stays as it is.
        """
        return ClusterMap(
            self.centroids,
            embedder_id=self.embedder_id,
            names=self.names,
            top=self.top,
            temperature=self.temperature,
            learned_clusters=self.learned_clusters,
            reference_models=reference_models or self.reference_models,
            fitted_prompts=fitted_prompts or self.fitted_prompts,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out FAISS's index and its buffers, which are made again where the map is used."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_index", "_single")}

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

    @cached_property
    def _single(self) -> _SearchOfThread:
        return _SearchOfThread(self._index, self.top, self.temperature)

    def _check(self) -> None:
        if len(self.names) != self.size:
            raise InvalidInput(f"{len(self.names)} names for {self.size} clusters")
        for clusters in self.learned_clusters:
            if clusters.dimension not in (self.dimension, self.dimension + SURFACE_FEATURES):
                raise InvalidInput(f"learned clusters of {clusters.dimension} dimensions, not {self.dimension}")
        if self.reference_models and len(self.reference_models.overlap) != self.size:
            raise InvalidInput(f"a history of {len(self.reference_models.overlap)} clusters for {self.size}")
        if self.fitted_prompts and len(self.fitted_prompts.shares) != self.size:
            raise InvalidInput(f"shares of {len(self.fitted_prompts.shares)} clusters for {self.size}")


def assign_texts(texts: Sequence[str], embedder: Embedder, cluster_map: ClusterMap) -> Assignment:
    """Assign n texts to the clusters of a map that was fitted with this embedder."""
    return cluster_map.assign(embedder.embed(texts), cluster_map.surface_of(texts))


def assign_prompts(prompts: Sequence[str], embedder: Embedder, cluster_map: ClusterMap) -> Assignment:
    """Assign n prompts of one turn as a server assigns them: of a long one, its two ends are embedded."""
    return assign_texts([truncate_middle(prompt) for prompt in prompts], embedder, cluster_map)


class _SingleSearch:
    """Assign one vector at a time, as on each request, in arrays that are allocated once.

    This is the call below FAISS's Python wrapper, which allocates and checks its arrays anew each time. FAISS uses as
    many OpenMP threads as there are vectors, and so one: OpenMP's own limit, which fitting uses up, stays as it is.
    """

    def __init__(self, index: faiss.IndexFlatIP, top: int, temperature: float) -> None:
        import faiss

        untyped: Any = index
        self.vector: Floats = np.empty((1, index.d), dtype=np.float32)
        self._search = untyped.search_c
        self._softmax = kernels.current().softmax
        self._top = top
        self._placed = (1, top)
        cosines: Any = np.empty(top, dtype=np.float32)
        ids: Any = np.empty(top, dtype=np.int64)
        self._cosines, self._ids = memoryview(cosines), memoryview(ids)
        self._pointers = [faiss.swig_ptr(array) for array in (self.vector, cosines, ids)]
        self._temperature = float(temperature)

    def assign(self, vector: Floats) -> Assignment:
        """Assign `vector`, (1, d), to its nearest clusters. The result is read-only."""
        if vector is not self.vector:
            if vector.shape != self.vector.shape:
                raise ValueError(f"a vector of shape {vector.shape}, not {self.vector.shape}")
            self.vector[:] = vector
        pointer, cosines, ids = self._pointers
        self._search(1, pointer, self._top, cosines, ids)
        if self._ids[-1] < 0:
            raise InvalidInput(NOT_FINITE)
        weights = self._softmax(self._cosines, self._temperature)
        # Arrays over bytes cannot be written to: many requests share them.
        return Assignment(
            np.ndarray(self._placed, np.int64, self._ids.tobytes()),
            np.ndarray(self._placed, np.float32, weights),
            np.ndarray(1, np.float32, self._cosines[:1].tobytes()),
        )


class _SearchOfThread(threading.local):
    """A search for each thread: prompts are assigned on the event loop and in threads at once."""

    def __init__(self, index: faiss.IndexFlatIP, top: int, temperature: float) -> None:
        self.search = _SingleSearch(index, top, temperature)


def _join(assignments: Sequence[Assignment], starts: Sequence[int]) -> Assignment:
    """Give an equal share of each prompt to each assignment, heaviest cluster first."""
    ids = np.concatenate([part.ids + start for part, start in zip(assignments, starts, strict=True)], axis=1)
    stacked = np.concatenate([part.weights for part in assignments], axis=1)
    weights = np.asarray(stacked / np.float32(len(assignments)), np.float32)
    order = np.argsort(-weights, axis=1, kind="stable")
    ids, weights = np.take_along_axis(ids, order, axis=1), np.take_along_axis(weights, order, axis=1)
    return Assignment(ids, weights, assignments[0].cosines)
