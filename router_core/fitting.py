"""A cluster map from unlabelled prompts: embed, cluster, name. Reading prompt files belongs to the command line."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from router_core.clustering import TEMPERATURE, TOP, ClusterMap, spherical_kmeans
from router_core.errors import InvalidInput
from router_core.types import Embedder, Floats, Indices

BATCH = 512
NAME_WORDS = 3
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]{2}|[^\W\d_]{3,}")
"""Words, and pairs of the characters of scripts that put no spaces between words."""
SMOOTHING = 1e-3
FUNCTION_WORDS = frozenset(
    """about above after again all also and any are because been before being below between both but can could did does
    doing down during each few for from further had has have having her here hers him his how into its itself just more
    most not now off once only other our out over own same she should some such than that the their them then there
    these they this those through too under until very was were what when where which while who whom why will with
    would you your yours following answer come question""".split()  # noqa: SIM905
)
"""English words that name nothing, however distinctive."""

Progress = Callable[[str, int, int], None]
"""Told the step, how much of it is done, and how much there is."""


def fit_map(
    texts: Iterable[str],
    embedder: Embedder,
    clusters: int,
    *,
    seed: int = 0,
    top: int = TOP,
    temperature: float = TEMPERATURE,
    progress: Progress = lambda _step, _done, _total: None,
) -> ClusterMap:
    """Fit K spherical k-means clusters to the distinct prompts and name each by its most distinctive words.

    Raises:
        InvalidInput: fewer distinct prompts than clusters.
    """
    prompts = list(dict.fromkeys(text for text in texts if text.strip()))
    if len(prompts) < clusters:
        raise InvalidInput(f"{clusters} clusters need at least as many distinct prompts; there are {len(prompts)}")
    vectors = _embed(prompts, embedder, progress)
    progress("clustering", 0, 1)
    centroids = spherical_kmeans(vectors, clusters, seed=seed)
    progress("clustering", 1, 1)
    nearest = ClusterMap(centroids, embedder_id=embedder.id, top=1).assign(vectors).ids[:, 0]
    names = cluster_names(prompts, nearest, clusters)
    return ClusterMap(centroids, embedder_id=embedder.id, names=names, top=top, temperature=temperature)


def token_weights(token_counts: Sequence[int] | Indices) -> Floats:
    """(V,) 1e-3/(1e-3 + p(token)): what the static embedder multiplies each token by (Arora et al. 2017)."""
    counts = np.asarray(token_counts, dtype=np.float64)
    return np.asarray(SMOOTHING / (SMOOTHING + counts / counts.sum()), dtype=np.float32)


def cluster_names(prompts: Sequence[str], nearest: Indices, clusters: int) -> list[str]:
    """Per cluster, the words whose share of its prompts most exceeds that elsewhere (frequency times log-odds)."""
    inside = [Counter[str]() for _ in range(clusters)]
    for prompt, cluster in zip(prompts, nearest, strict=True):
        inside[cluster].update(set(WORD.findall(prompt.lower())) - FUNCTION_WORDS)
    sizes = np.bincount(nearest, minlength=clusters)
    everywhere = sum(inside, Counter[str]())
    return [_name(words, int(sizes[k]), everywhere, len(prompts)) or f"cluster {k}" for k, words in enumerate(inside)]


def _name(words: Counter[str], size: int, everywhere: Counter[str], total: int) -> str:
    def distinctiveness(word: str) -> float:
        here = words[word] / max(size, 1)
        elsewhere = (everywhere[word] - words[word] + 1) / (total - size + 1)
        return float(here * np.log(here / elsewhere))

    return ", ".join(sorted(words, key=lambda word: (-distinctiveness(word), word))[:NAME_WORDS])


def _embed(prompts: Sequence[str], embedder: Embedder, progress: Progress) -> Floats:
    batches = []
    for start in range(0, len(prompts), BATCH):
        batches.append(embedder.embed(prompts[start : start + BATCH]))
        progress("embedding", min(start + BATCH, len(prompts)), len(prompts))
    return np.concatenate(batches)
