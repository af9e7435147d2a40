"""The steps of fitting a map that read or embed every prompt, in this process. On Ray they are fit_on_ray.py."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from proxy.cli.console import Progress
from proxy.cli.inputs import opened_embedder
from proxy.cli.prompt_files import read_prompts
from router_core.clustering import ClusterMap
from router_core.fitting import EmbeddedPrompts, batches, count_nearest, embed_prompts
from router_core.sampling import PromptSample, sample_prompts
from router_core.types import Embedder, Indices

_TELL_EVERY = 10_000
"""Prompts."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be fitted."""

    paths: Sequence[Path]
    clusters: int
    seed: int
    embedder: str
    data_dir: Path


class Steps(Protocol):
    """Where the work is done. Each gives the same wherever that is."""

    def sample(self) -> PromptSample: ...

    def embed(self, prompts: Sequence[str]) -> EmbeddedPrompts: ...

    def count(self, fitted: ClusterMap) -> Indices:
        """(K,) how many of all prompts lie nearest to each cluster."""


class StepsHere:
    """One after the other, in this process."""

    def __init__(self, order: Order, bars: Progress) -> None:
        self._order = order
        self._bars = bars

    def sample(self) -> PromptSample:
        return sample_prompts(self._read("reading"), self._order.clusters, seed=self._order.seed)

    def embed(self, prompts: Sequence[str]) -> EmbeddedPrompts:
        vectors = embed_prompts(prompts, self._embedder, self._bars.update)
        return EmbeddedPrompts(prompts, vectors, self._embedder.id)

    def count(self, fitted: ClusterMap) -> Indices:
        hard = fitted.hardened()
        counts = np.zeros(hard.size, dtype=np.int64)
        for batch in batches(self._read("counting")):
            counts += count_nearest(batch, self._embedder, hard)
        return counts

    @cached_property
    def _embedder(self) -> Embedder:
        return opened_embedder(self._order.embedder, self._order.data_dir)

    def _read(self, label: str) -> Iterator[str]:
        return told(read_prompts(self._order.paths), label, self._bars)


class Rate:
    """Prompts so far, and how many a second, on a bar whose end is not known."""

    def __init__(self, label: str, bars: Progress) -> None:
        self._label = label
        self._bars = bars
        self._started = time.monotonic()

    def tell(self, done: int, *, all_done: bool = False) -> None:
        per_second = done / max(time.monotonic() - self._started, 1e-3)
        self._bars.update(self._label, done, done if all_done else 0, f"{per_second:,.0f}/s")


def told(texts: Iterable[str], label: str, bars: Progress) -> Iterator[str]:
    """The texts, while the bar says how many they are."""
    rate, done = Rate(label, bars), 0
    for done, text in enumerate(texts, 1):
        yield text
        if done % _TELL_EVERY == 0:
            rate.tell(done)
    rate.tell(done, all_done=True)
