"""A cluster map from unlabelled prompts: sample, embed, cluster. Reading prompt files belongs to the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from router_core.clustering import TEMPERATURE, TOP, ClusterMap
from router_core.errors import InvalidInput
from router_core.history import LARGEST, history_of
from router_core.kmeans import kmeans
from router_core.naming import cluster_names
from router_core.sampling import PromptSample, sample_prompts
from router_core.taught import TaughtClusters
from router_core.teaching import fit_taught
from router_core.types import Doubles, Embedder, Floats, Indices

BATCH = 512
"""Texts that an embedder is given at once."""
SMOOTHING = 1e-3

Progress = Callable[[str, int, int], None]
"""Told the step, how much of it is done, and how much there is (0: not known)."""


@dataclass(frozen=True, eq=False)
class EmbeddedPrompts:
    """What a map is fitted to."""

    texts: Sequence[str]
    """n distinct prompts."""
    vectors: Floats
    """(n, d), rows of unit length."""
    embedder_id: str


def no_progress(_step: str, _done: int, _total: int) -> None:
    """For callers that tell nobody."""


def fit_map(
    texts: Iterable[str],
    embedder: Embedder,
    clusters: int,
    *,
    seed: int = 0,
    top: int = TOP,
    temperature: float = TEMPERATURE,
    progress: Progress = no_progress,
) -> ClusterMap:
    """Fit K spherical k-means clusters to the distinct prompts and name each by its most distinctive words.

    The prompts are read once, one by one. Beyond 256 for each cluster (and 16,384 in all) a sample of the distinct ones
    is embedded and held, drawn by `seed`; up to there, all of them.

    Raises:
        InvalidInput: fewer distinct prompts than clusters.
    """
    prompts = distinct_prompts(sample_prompts(texts, clusters, seed=seed), clusters)
    embedded = EmbeddedPrompts(prompts, embed_prompts(prompts, embedder, progress), embedder.id)
    return fit_embedded(embedded, clusters, seed=seed, top=top, temperature=temperature, progress=progress)


def distinct_prompts(sample: PromptSample, clusters: int) -> list[str]:
    """The sample's texts, if there are enough of them. Raises InvalidInput."""
    if len(sample) < clusters:
        raise InvalidInput(f"{clusters} clusters need at least as many distinct prompts; there are {len(sample)}")
    return sample.texts()


def embed_prompts(prompts: Sequence[str], embedder: Embedder, progress: Progress = no_progress) -> Floats:
    """(n, d) of n prompts, batch by batch."""
    vectors = np.empty((len(prompts), embedder.dimension), dtype=np.float32)
    for start in range(0, len(prompts), BATCH):
        vectors[start : start + BATCH] = embedder.embed(prompts[start : start + BATCH])
        progress("embedding", min(start + BATCH, len(prompts)), len(prompts))
    return vectors


def fit_embedded(
    embedded: EmbeddedPrompts,
    clusters: int,
    *,
    seed: int = 0,
    top: int = TOP,
    temperature: float = TEMPERATURE,
    progress: Progress = no_progress,
) -> ClusterMap:
    """The map of prompts that are embedded already, wherever that was done, and of which no model is known."""
    progress("clustering", 0, 1)
    centroids = kmeans(embedded.vectors, clusters, seed=seed)
    progress("clustering", 1, 1)
    hard = ClusterMap(centroids, embedder_id=embedded.embedder_id, top=1)
    names = cluster_names(embedded.texts, hard.assign(embedded.vectors).ids[:, 0], clusters)
    plain = ClusterMap(centroids, embedder_id=embedded.embedder_id, names=names, top=top, temperature=temperature)
    return remembering(plain, embedded, np.empty((len(embedded.texts), 0)), ())


def fit_with_history(
    embedded: EmbeddedPrompts,
    scores: Doubles,
    models: Sequence[str],
    clusters: int,
    *,
    seed: int = 0,
    progress: Progress = no_progress,
) -> ClusterMap:
    """The map of prompts of which some are scored: (n, R) scores in [0, 1] of R known models, NaN where unlabelled.

    Known models with enough labels give it clusters of their own beside those of the embedding.
    """
    plain = fit_embedded(embedded, clusters, seed=seed, progress=progress)
    taught = fit_taught(embedded.vectors, scores, seed=seed)
    return remembering(_with_taught(plain, taught, embedded), embedded, scores, models)


def remembering(
    cluster_map: ClusterMap, embedded: EmbeddedPrompts, scores: Doubles, models: Sequence[str]
) -> ClusterMap:
    """The same map with what these prompts and (n, R) scores tell of its clusters: the same id, better estimates.

    A map of more than LARGEST clusters stays as it is.
    """
    if cluster_map.size > LARGEST:
        return cluster_map
    assignment = cluster_map.assign(embedded.vectors)
    return cluster_map.with_history(history_of(assignment, cluster_map.size, scores, models))


def _with_taught(plain: ClusterMap, taught: Sequence[TaughtClusters], embedded: EmbeddedPrompts) -> ClusterMap:
    names = list(plain.names)
    for clusters in taught:
        names += cluster_names(embedded.texts, clusters.assign(embedded.vectors).ids[:, 0], clusters.size)
    return ClusterMap(
        plain.centroids,
        embedder_id=plain.embedder_id,
        names=names,
        top=plain.top,
        temperature=plain.temperature,
        taught=taught,
    )


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts that are not blank, as many at a time as are embedded at once."""
    told = (text for text in texts if text.strip())
    while batch := list(islice(told, BATCH)):
        yield batch


def count_nearest(texts: Sequence[str], embedder: Embedder, hard: ClusterMap) -> Indices:
    """(K,) how many of a batch of texts lie in each cluster of a hardened map. Counts of batches add up."""
    nearest = hard.assign(embedder.embed(texts)).ids[:, 0]
    return np.bincount(nearest, minlength=hard.size)


def token_weights(token_counts: Sequence[int] | Indices) -> Floats:
    """(V,) 1e-3/(1e-3 + p(token)): what the static embedder multiplies each token by (Arora et al. 2017)."""
    counts = np.asarray(token_counts, dtype=np.float64)
    return np.asarray(SMOOTHING / (SMOOTHING + counts / counts.sum()), dtype=np.float32)
