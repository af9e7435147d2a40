from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from router_core.clustering import ClusterMap
from router_core.pool import Candidate, Pool
from router_core.profiles import Profile
from router_core.types import FREE, UNKNOWN_CAPABILITIES, Assignment, Capabilities, Floats, Price


class FirstLetterEmbedder:
    """Map a… to the first axis, b… to the second, c… to the third; anything else has no token."""

    id = "first-letter"
    dimension = 3

    def embed(self, texts: Sequence[str]) -> Floats:
        axes = np.vstack([np.eye(3), np.zeros((1, 3))]).astype(np.float32)
        return np.asarray(axes[["abc".find(text[:1]) if text[:1] in {"a", "b", "c"} else 3 for text in texts]])


def a_map(*, top: int = 1) -> ClusterMap:
    """Build three clusters, one per axis."""
    return ClusterMap(np.eye(3, dtype=np.float32), embedder_id="first-letter", names=("a", "b", "c"), top=top)


def an_assignment(*clusters: int) -> Assignment:
    """Put each prompt wholly in one cluster."""
    return Assignment(np.array(clusters, dtype=np.int64).reshape(-1, 1), np.ones((len(clusters), 1), dtype=np.float32))


def a_profile(
    errors: Sequence[float], labels: float = 100.0, tokens: float | None = 100.0, seconds: float = 1.0
) -> Profile:
    """Build rates on `a_map`, or on a map of its own when the length differs."""
    document: dict[str, object] = {"map": a_map().id, "errors": list(errors), "labels": [labels] * len(errors)}
    if tokens is not None:
        document |= {"mean_output_tokens": tokens, "mean_seconds": seconds}
    return Profile.from_json(document)


def a_candidate(
    name: str = "model",
    errors: Sequence[float] | None = (0.5, 0.5, 0.5),
    price: Price | None = FREE,
    *,
    capabilities: Capabilities = UNKNOWN_CAPABILITIES,
    tokens: float | None = 100.0,
    seconds: float = 1.0,
) -> Candidate:
    profile = None if errors is None else a_profile(errors, tokens=tokens, seconds=seconds)
    return Candidate(name, profile, price, capabilities)


def a_pool(*candidates: Candidate) -> Pool:
    return Pool.build(candidates, a_map())


def priced_pool(models: Mapping[str, tuple[float, float]]) -> Pool:
    """Map each name to (error everywhere, USD per million output tokens)."""
    return a_pool(*(a_candidate(name, (error,) * 3, Price(0.0, usd / 1e6)) for name, (error, usd) in models.items()))
