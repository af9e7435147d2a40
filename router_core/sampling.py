"""A sample of the distinct prompts in bounded memory, the same in any order and in any number of parts. No files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from heapq import heappush, heapreplace

PER_CLUSTER = 256
"""Prompts that k-means is given per cluster: what FAISS trains on, and all that it would keep of more."""
SMALLEST = 16_384
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
    return PromptSample(max(PER_CLUSTER * clusters, SMALLEST), seed=seed, part=part)


def sample_prompts(texts: Iterable[str], clusters: int, *, seed: int, part: int = 0) -> PromptSample:
    """One pass over any number of prompts; what is held is the sample."""
    sample = empty_sample(clusters, seed=seed, part=part)
    for text in texts:
        sample.add(text)
    return sample
