"""How much label weight a set of prompts gives each cluster, and which clusters it leaves thin. No text, no names."""

from __future__ import annotations

import numpy as np

from router_core.types import Assignment, Doubles

THIN_LABELS = 2.0
"""Below this weight the prior of the shrunk recipe (weight ½) still makes up more than a fifth of the estimate."""


def coverage(assignment: Assignment, clusters: int) -> Doubles:
    """(K,) label weight per cluster, Σ_j w_jk; the total is the number of prompts."""
    labels: Doubles = assignment.dense(clusters).sum(axis=0)
    return labels


def thin_clusters(labels: Doubles, *, below: float = THIN_LABELS) -> tuple[int, ...]:
    """The clusters with less label weight than `below`, thinnest first."""
    order = np.argsort(labels, kind="stable")
    return tuple(int(cluster) for cluster in order if labels[cluster] < below)
