from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappush, heapreplace
from itertools import islice

import numpy as np

from router_core.clustering import (
    DEFAULT_TEMPERATURE,
    DEFAULT_TOP,
    MAX_CLUSTERS_FOR_OVERLAP,
    ClusterMap,
    FittedPrompts,
    LearnedClusters,
    kmeans,
    reference_models_of,
)
from router_core.errors import InvalidInput
from router_core.learned_clusters import fit_learned_clusters
from router_core.surface import surface_features
from router_core.types import Doubles, Embedder, Floats, Indices

# Prompts per cluster that k-means is given: of more, FAISS would use a random sample of this size.
PROMPTS_PER_CLUSTER = 256

MIN_SAMPLE_SIZE = 16_384

HASH_BYTES = 8


class PromptSample:
    """A uniform sample of distinct prompts: those with the smallest seeded hashes (bottom-k sampling).

    Only its hash decides whether a prompt is kept. So repeats need no memory, the order does not matter, and samples of
    parts merge into the sample of the whole. Up to `size` distinct prompts, all are kept. Two prompts with the same
    64-bit hash would count as one: among ten million, a chance of about one in 370,000.
    """

    def __init__(self, size: int, *, seed: int = 0, part: int = 0) -> None:
        """
        Args:
            size: how many prompts are kept.
            part: number of this part among those that will be merged, in the order of their prompts.
        """
        # Prompts added, repeats included, blank ones not.
        self.read = 0
        self._size = size
        self._key = str(seed).encode()
        self._part = part
        # Hash → where the prompt was first read, and its text.
        self._kept: dict[int, tuple[tuple[int, int], str]] = {}
        # A heap of the negated hashes: its head is the next to be replaced.
        self._largest: list[int] = []

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, text: str) -> None:
        if not text.strip():
            return
        self.read += 1
        self._keep(self._hash(text), (self._part, self.read), text)

    def merge(self, other: PromptSample) -> None:
        """Add another part's sample, drawn with the same size and seed."""
        self.read += other.read
        for number, (place, text) in other._kept.items():
            self._keep(number, place, text)

    def texts(self) -> list[str]:
        """Return the prompts in the order of their first appearance."""
        return [text for _, text in sorted(self._kept.values())]

    def _keep(self, number: int, place: tuple[int, int], text: str) -> None:
        if number in self._kept:
            self._kept[number] = min(self._kept[number], (place, text))
        elif len(self._kept) < self._size:
            heappush(self._largest, -number)
            self._kept[number] = (place, text)
        elif number < -self._largest[0]:
            del self._kept[-heapreplace(self._largest, -number)]
            self._kept[number] = (place, text)

    def _hash(self, text: str) -> int:
        # Lone surrogates are legal in JSON.
        content = text.encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(content, digest_size=HASH_BYTES, key=self._key).digest())


def empty_sample(clusters: int, *, seed: int, part: int = 0) -> PromptSample:
    """Make a sample as large as k-means needs for so many clusters."""
    return PromptSample(max(PROMPTS_PER_CLUSTER * clusters, MIN_SAMPLE_SIZE), seed=seed, part=part)


def sample_prompts(texts: Iterable[str], clusters: int, *, seed: int, part: int = 0) -> PromptSample:
    """Sample any number of prompts in one pass, holding only the sample in memory."""
    sample = empty_sample(clusters, seed=seed, part=part)
    for text in texts:
        sample.add(text)
    return sample


NAME_WORDS = 3

# Words, and pairs of the characters of scripts that put no spaces between words.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]{2}|[^\W\d_]{3,}")

# English words that are never part of a name.
FUNCTION_WORDS = frozenset(
    """about above after again all also and any are because been before being below between both but can could did does
    doing down during each few for from further had has have having her here hers him his how into its itself just more
    most not now off once only other our out over own same she should some such than that the their them then there
    these they this those through too under until very was were what when where which while who whom why will with
    would you your yours following answer come question""".split()
)


def cluster_names(prompts: Sequence[str], nearest: Indices, clusters: int) -> list[str]:
    """Name each cluster by its most distinctive words.

    These are the words of the largest p·ln(p/q), p being the share of its prompts that have the word, q the share of
    all others that do.

    Args:
        nearest: (n,) the cluster of each prompt.
    """
    inside = [Counter[str]() for _ in range(clusters)]
    for prompt, cluster in zip(prompts, nearest, strict=True):
        inside[cluster].update(set(WORD.findall(prompt.lower())) - FUNCTION_WORDS)
    sizes = np.bincount(nearest, minlength=clusters)
    everywhere = Counter[str]()
    for words in inside:
        everywhere.update(words)
    return [_name(words, int(sizes[k]), everywhere, len(prompts)) or f"cluster {k}" for k, words in enumerate(inside)]


def _name(words: Counter[str], size: int, everywhere: Counter[str], total: int) -> str:
    def distinctiveness(word: str) -> float:
        here = words[word] / max(size, 1)
        elsewhere = (everywhere[word] - words[word] + 1) / (total - size + 1)
        return float(here * np.log(here / elsewhere))

    return ", ".join(sorted(words, key=lambda word: (-distinctiveness(word), word))[:NAME_WORDS])


# Texts that are embedded at once.
BATCH_SIZE = 512

# Called with the step, how much of it is done, and how much there is (0: not known).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class EmbeddedPrompts:
    """The prompts that a map is fitted to."""

    texts: Sequence[str]
    """n distinct prompts."""
    vectors: Floats
    """(n, d), rows of unit length."""
    embedder_id: str

    @cached_property
    def surface(self) -> Floats:
        """(n, SURFACE_FEATURES)"""
        return surface_features(self.texts)


def no_progress(_step: str, _done: int, _total: int) -> None:
    """Report nothing."""


def fit_map(
    texts: Iterable[str],
    embedder: Embedder,
    clusters: int,
    *,
    seed: int = 0,
    top: int = DEFAULT_TOP,
    temperature: float = DEFAULT_TEMPERATURE,
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
    """Return the sample's texts, or raise InvalidInput if there are fewer than clusters."""
    if len(sample) < clusters:
        raise InvalidInput(f"{clusters} clusters need at least as many distinct prompts; there are {len(sample)}")
    return sample.texts()


def embed_prompts(prompts: Sequence[str], embedder: Embedder, progress: Progress = no_progress) -> Floats:
    """Embed n prompts batch by batch; returns (n, d)."""
    vectors = np.empty((len(prompts), embedder.dimension), dtype=np.float32)
    for start in range(0, len(prompts), BATCH_SIZE):
        vectors[start : start + BATCH_SIZE] = embedder.embed(prompts[start : start + BATCH_SIZE])
        progress("embedding", min(start + BATCH_SIZE, len(prompts)), len(prompts))
    return vectors


def fit_embedded(
    embedded: EmbeddedPrompts,
    clusters: int,
    *,
    seed: int = 0,
    top: int = DEFAULT_TOP,
    temperature: float = DEFAULT_TEMPERATURE,
    progress: Progress = no_progress,
) -> ClusterMap:
    """Fit a map to prompts that are embedded already, without any model's scores."""
    progress("clustering", 0, 1)
    centroids = kmeans(embedded.vectors, clusters, seed=seed)
    progress("clustering", 1, 1)
    hard = ClusterMap(centroids, embedder_id=embedded.embedder_id, top=1)
    names = cluster_names(embedded.texts, hard.assign(embedded.vectors).ids[:, 0], clusters)
    plain = ClusterMap(centroids, embedder_id=embedded.embedder_id, names=names, top=top, temperature=temperature)
    return with_history(plain, embedded, np.empty((len(embedded.texts), 0)), ())


def fit_with_outcomes(
    embedded: EmbeddedPrompts,
    scores: Doubles,
    models: Sequence[str],
    clusters: int,
    *,
    seed: int = 0,
    progress: Progress = no_progress,
) -> ClusterMap:
    """Fit a map to prompts and to what known models scored on them.

    Known models with enough labels add clusters of their own to those of the embedding.

    Args:
        scores: (n, R) in [0, 1] of the R `models`, NaN where unlabelled.
    """
    plain = fit_embedded(embedded, clusters, seed=seed, progress=progress)
    learned = fit_learned_clusters(embedded.vectors, embedded.surface, scores, seed=seed)
    return with_history(_with_learned_clusters(plain, learned, embedded), embedded, scores, models)


def with_history(
    cluster_map: ClusterMap, embedded: EmbeddedPrompts, scores: Doubles, models: Sequence[str]
) -> ClusterMap:
    """Return the same map, with the same id, that knows its prompts, and what models got wrong in its clusters.

    A map of more than MAX_CLUSTERS_FOR_OVERLAP clusters does not know how they overlap, nor the models.

    Args:
        scores: (n, R) in [0, 1] of the R `models`, NaN where unlabelled.
    """
    assignment = cluster_map.assign(embedded.vectors, embedded.surface)
    fitted_prompts = FittedPrompts.of(assignment, cluster_map.size)
    if cluster_map.size > MAX_CLUSTERS_FOR_OVERLAP:
        return cluster_map.with_known(fitted_prompts=fitted_prompts)
    return cluster_map.with_known(
        reference_models_of(assignment, cluster_map.size, scores, models), fitted_prompts=fitted_prompts
    )


def _with_learned_clusters(
    plain: ClusterMap, learned: Sequence[LearnedClusters], embedded: EmbeddedPrompts
) -> ClusterMap:
    names = list(plain.names)
    described = np.concatenate((embedded.vectors, embedded.surface), axis=1)
    for clusters in learned:
        nearest = clusters.assign(described[:, : clusters.dimension]).ids[:, 0]
        names += cluster_names(embedded.texts, nearest, clusters.size)
    return ClusterMap(
        plain.centroids,
        embedder_id=plain.embedder_id,
        names=names,
        top=plain.top,
        temperature=plain.temperature,
        learned_clusters=learned,
    )


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield the texts that are not blank, in batches of the size that is embedded at once."""
    usable = (text for text in texts if text.strip())
    while batch := list(islice(usable, BATCH_SIZE)):
        yield batch


def count_nearest(texts: Sequence[str], embedder: Embedder, hard: ClusterMap) -> Indices:
    """Count, (K,), how many of the texts are nearest to each cluster of a map with hard assignment."""
    nearest = hard.assign(embedder.embed(texts)).ids[:, 0]
    return np.bincount(nearest, minlength=hard.size)
