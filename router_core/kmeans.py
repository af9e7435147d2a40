"""K-means by FAISS. Knows nothing of prompts."""

from __future__ import annotations

import numpy as np

from router_core.errors import InvalidInput
from router_core.types import Floats


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
