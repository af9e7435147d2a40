from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappush, heapreplace
from itertools import islice

import numpy as np

from router_core.clustering import (
    MAX_CLUSTERS_FOR_OVERLAP,
    TEMPERATURE,
    TOP,
    ClusterMap,
    LearnedClusters,
    kmeans,
    reference_models_of,
)
from router_core.errors import InvalidInput
from router_core.learned_clusters import fit_learned_clusters
from router_core.types import Doubles, Embedder, Floats, Indices

PER_CLUSTER = 256
"""Prompts that k-means is given per cluster: what FAISS trains on, and all that it would keep of more."""

MIN_SAMPLE = 16_384

HASH_BYTES = 8


class PromptSample:
    """The prompts whose seeded hashes are the smallest (bottom-k sampling): every distinct prompt is as likely.

    A prompt's hash decides alone, so repeats need no memory, the order does not matter, and samples of parts merge into
    the sample of the whole. As long as there is room, nothing is left out. Two prompts of one 64-bit hash would pass
    for the same: among ten million, about one chance in 370,000.
    """

    def __init__(self, size: int, *, seed: int = 0, part: int = 0) -> None:
        """`part` numbers the parts that will be merged, in the order in which their prompts are read."""
        self.read = 0
        """Prompts seen, repeats included, blank ones not."""
        self._size = size
        self._key = str(seed).encode()
        self._part = part
        self._kept: dict[int, tuple[tuple[int, int], str]] = {}
        """hash → where it was first read, and the text."""
        self._largest: list[int] = []
        """A heap of the hashes, negated: its head is the next to go."""

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, text: str) -> None:
        if not text.strip():
            return
        self.read += 1
        self._keep(self._hash(text), (self._part, self.read), text)

    def merge(self, other: PromptSample) -> None:
        """Take in a sample of other prompts, or of other repeats, drawn with the same size and seed."""
        self.read += other.read
        for number, (place, text) in other._kept.items():
            self._keep(number, place, text)

    def texts(self) -> list[str]:
        """In the order of first appearance."""
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
        """Lone surrogates, legal in JSON, are hashed too."""
        content = text.encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(content, digest_size=HASH_BYTES, key=self._key).digest())


def empty_sample(clusters: int, *, seed: int, part: int = 0) -> PromptSample:
    """With room for what k-means needs."""
    return PromptSample(max(PER_CLUSTER * clusters, MIN_SAMPLE), seed=seed, part=part)


def sample_prompts(texts: Iterable[str], clusters: int, *, seed: int, part: int = 0) -> PromptSample:
    """One pass over any number of prompts; what is held is the sample."""
    sample = empty_sample(clusters, seed=seed, part=part)
    for text in texts:
        sample.add(text)
    return sample


NAME_WORDS = 3

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]{2}|[^\W\d_]{3,}")
"""Words, and pairs of the characters of scripts that put no spaces between words."""

FUNCTION_WORDS = frozenset(
    """about above after again all also and any are because been before being below between both but can could did does
    doing down during each few for from further had has have having her here hers him his how into its itself just more
    most not now off once only other our out over own same she should some such than that the their them then there
    these they this those through too under until very was were what when where which while who whom why will with
    would you your yours following answer come question""".split()
)
"""English words that name nothing, however distinctive."""


def cluster_names(prompts: Sequence[str], nearest: Indices, clusters: int) -> list[str]:
    """Per cluster, the words whose share of its prompts most exceeds that elsewhere (frequency times log-odds)."""
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
    return with_overlap(plain, embedded, np.empty((len(embedded.texts), 0)), ())


def fit_with_outcomes(
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
    taught = fit_learned_clusters(embedded.vectors, scores, seed=seed)
    return with_overlap(_with_taught(plain, taught, embedded), embedded, scores, models)


def with_overlap(
    cluster_map: ClusterMap, embedded: EmbeddedPrompts, scores: Doubles, models: Sequence[str]
) -> ClusterMap:
    """The same map with what these prompts and (n, R) scores tell of its clusters: the same id, better estimates.

    A map of more than LARGEST clusters stays as it is.
    """
    if cluster_map.size > MAX_CLUSTERS_FOR_OVERLAP:
        return cluster_map
    assignment = cluster_map.assign(embedded.vectors)
    return cluster_map.with_reference_models(reference_models_of(assignment, cluster_map.size, scores, models))


def _with_taught(plain: ClusterMap, taught: Sequence[LearnedClusters], embedded: EmbeddedPrompts) -> ClusterMap:
    names = list(plain.names)
    for clusters in taught:
        names += cluster_names(embedded.texts, clusters.assign(embedded.vectors).ids[:, 0], clusters.size)
    return ClusterMap(
        plain.centroids,
        embedder_id=plain.embedder_id,
        names=names,
        top=plain.top,
        temperature=plain.temperature,
        learned_clusters=taught,
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
