"""What each method is called, and what it looks like wherever it is drawn. A row a method; draws nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Look:
    """The colours tell apart on white and on near black, also for most who see few colours."""

    label: str
    short: str
    """For where there is little room."""
    colour: str
    dashes: tuple[float, ...] = ()
    """On and off, in line widths; () is a whole line."""


OURS = "ours"
LOOKS: Mapping[str, Look] = {
    "cheapest": Look("cheapest model", "cheapest", "#8a8f98", (1.0, 1.5)),
    "best_single": Look("best single model", "best single", "#6b7280", (6.0, 1.5, 1.0, 1.5)),
    "random_mix": Look("random mix (ZeroRouter)", "random mix", "#8a8f98", (4.0, 2.0)),
    "knn": Look("k nearest neighbours", "k-NN", "#0e9f8e"),
    "kmeans_raw": Look("K-means, raw (UniRoute)", "K-means raw", "#2f7ed8"),
    "kmeans_laplace": Look("K-means, Laplace", "K-means Laplace", "#5cb3e6", (5.0, 1.5)),
    "learned_map": Look("LearnedMap (UniRoute)", "LearnedMap", "#a668d6"),
    "hiershrink": Look("HierShrink", "HierShrink", "#c79a14"),
    "ridge": Look("ridge regression", "ridge", "#c2679b", (5.0, 1.5)),
    OURS: Look("ours", "ours", "#e4572e"),
    "oracle": Look("oracle", "oracle", "#8a8f98", (1.5, 2.5)),
}
"""By the ids of router_core.evaluation.study.METHODS, in the same order."""
ESTIMATING = ("knn", "kmeans_raw", "kmeans_laplace", "learned_map", "hiershrink", "ridge")
"""The rivals: like ours they estimate errors prompt by prompt, from the same answers."""
