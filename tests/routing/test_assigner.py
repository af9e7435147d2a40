from __future__ import annotations

import gc
import random
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from proxy.routing import assigner as assigning
from proxy.routing.assigner import AssignmentTimeout, ClusterAssigner, deadline_of
from router_core.artifact import builtin_map
from router_core.clustering import ClusterMap
from router_core.embedding import MAX_INLINE_BYTES, StaticEmbedder, static_embedder
from router_core.fitting import EmbeddedPrompts, fit_with_outcomes
from router_core.surface import surface_features
from router_core.types import Assignment, Floats
from tests.support.makers import CORNERS
from tests.support.selections import Corners

FAMILIAR = "what is the sum of these two numbers"


def unheard_of(characters: int) -> str:
    letters = random.Random(characters)
    words = ("".join(letters.choices("bcdfghjklmnpqrstvwxz", k=9)) for _ in range(characters // 10))
    return " ".join(words)


class Watched(StaticEmbedder):
    """Record the threads in which texts are embedded."""

    threads: list[str]

    @classmethod
    def like(cls, embedder: StaticEmbedder) -> Watched:
        made = cls.__new__(cls)
        vars(made).update(vars(embedder), threads=[])
        return made

    def embed(self, texts: Sequence[str]) -> Floats:
        self.threads.append(threading.current_thread().name)
        return super().embed(texts)


def same(one: Assignment, other: Assignment) -> bool:
    return np.array_equal(one.ids, other.ids) and np.array_equal(one.weights, other.weights)


@pytest.mark.parametrize("text", [FAMILIAR, "", "?!", "Ünïcödé 漢字 \U0001f600", "half \ud800 a character", "[SEP] x"])
async def test_a_prompt_has_the_same_clusters_whichever_way_they_are_found(embedder: StaticEmbedder, text: str) -> None:
    cluster_map, assigner = builtin_map(), ClusterAssigner(embedder, 5.0)
    expected = cluster_map.assign(embedder.embed([text]))

    for _ in range(3):  # with words that are new, with known ones, and remembered whole
        assert same(await assigner.assign(text, cluster_map), expected)
    assigner.close()


async def test_a_map_that_reads_surface_features_gets_them_whichever_way_a_prompt_is_embedded(
    embedder: StaticEmbedder,
) -> None:
    texts = [f"{row} + {row}" if row % 2 else f"what is the {row}" for row in range(300)]
    scores = np.repeat(np.arange(300)[:, None] % 2 == 0, 3, axis=1).astype(np.float64)
    embedded = EmbeddedPrompts(texts, embedder.embed(texts), embedder.id)
    cluster_map, assigner = fit_with_outcomes(embedded, scores, ("x", "y", "z"), 4), ClusterAssigner(embedder, 30.0)

    for text in (FAMILIAR, FAMILIAR * (MAX_INLINE_BYTES // 20)):
        expected = cluster_map.assign(embedder.embed([text]), surface_features([text]))
        assert same(await assigner.assign(text, cluster_map), expected)
    assigner.close()


def test_static_embedders_have_the_shorter_deadline() -> None:
    assert deadline_of("multilingual") == deadline_of("static") < deadline_of("transformer")


async def test_only_what_takes_long_changes_threads(embedder: StaticEmbedder) -> None:
    watched = Watched.like(embedder)
    assigner, cluster_map = ClusterAssigner(watched, 30.0), builtin_map()
    for text in (FAMILIAR, unheard_of(4_000), "a [CLS] b", "漢" * (MAX_INLINE_BYTES // 3)):
        await assigner.assign(text, cluster_map)
    assert watched.threads == []

    for text in (FAMILIAR * (MAX_INLINE_BYTES // 20), "漢" * (MAX_INLINE_BYTES // 3 + 1)):
        await assigner.assign(text, cluster_map)
    assert [name[:9] for name in watched.threads] == ["embedding"] * 2
    assigner.close()


async def test_a_prompt_that_comes_again_is_not_embedded_again() -> None:
    texts: list[str] = []

    class Seen(Corners):
        def embed(self, batch: Sequence[str]) -> Floats:
            texts.extend(batch)
            return super().embed(batch)

    assigner = ClusterAssigner(Seen(), 5.0)
    first = await assigner.assign("one", CORNERS)

    again = await assigner.assign("one", CORNERS)
    assert texts == ["one"]
    assert [array.flags.writeable for array in (again.ids, again.weights)] == [False, False]
    assert_same(again, first)
    other = ClusterMap(np.eye(4, dtype=np.float32), embedder_id="corners", top=3)
    assert (await assigner.assign("one", other)).ids.shape == (1, 3)
    assert texts == ["one", "one"]
    assigner.close()


async def test_an_assignment_is_remembered_bit_for_bit(embedder_cache: Path) -> None:
    assigner, cluster_map = ClusterAssigner(static_embedder(embedder_cache), 30.0), builtin_map()
    first = await assigner.assign("What is the capital of Norway?", cluster_map)

    assert_same(await assigner.assign("What is the capital of Norway?", cluster_map), first)
    assigner.close()


async def test_what_is_remembered_of_a_prompt_is_small(embedder_cache: Path) -> None:
    """Less than half of what three arrays of eight numbers take."""
    assigner, cluster_map = ClusterAssigner(static_embedder(embedder_cache), 30.0), builtin_map()
    prompts = [f"prompt {number}" for number in range(1_000)]
    await assigner.assign("warm up", cluster_map)
    gc.collect()
    tracemalloc.start()
    for prompt in prompts:
        await assigner.assign(prompt, cluster_map)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert taken / len(prompts) < 400
    assigner.close()


async def test_it_remembers_a_bounded_number_and_no_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assigning, "MAX_REMEMBERED", 8)
    assigner = ClusterAssigner(Corners(), 5.0)
    for number in range(50):
        await assigner.assign(f"prompt {number}", CORNERS)
        await assigner.assign("always", CORNERS)
    kept = list(assigner._known)

    assert len(kept) == 8
    assert all(len(key) == 16 + len(CORNERS.id) and b"prompt" not in key for key in kept)
    assigner.close()


def assert_same(one: Assignment, other: Assignment) -> None:
    """Compare bits and types."""
    for mine, theirs in ((one.ids, other.ids), (one.weights, other.weights), (one.cosines, other.cosines)):
        if mine is None or theirs is None:
            assert mine is theirs
            continue
        assert (mine.dtype, mine.shape, mine.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())


def blocked_embedder() -> Corners:
    """Block the embedder until it is released."""
    embedder = Corners()
    embedder.free.clear()
    return embedder


class Process:
    """Return the given seconds of CPU, one per look; call `then` at the last of them."""

    def __init__(self, *seconds: float, then: Callable[[], None] = lambda: None) -> None:
        self.looks = 0
        self._seconds = seconds
        self._then = then

    def __call__(self) -> float:
        self.looks += 1
        if self.looks == len(self._seconds):
            self._then()
        return self._seconds[min(self.looks, len(self._seconds)) - 1]


async def test_a_busy_machine_is_not_taken_for_a_slow_embedder() -> None:
    embedder = blocked_embedder()
    process = Process(*[0.0] * 8, then=embedder.free.set)  # several deadlines pass, in which it computes nothing
    assigner = ClusterAssigner(embedder, 0.005, process)
    assert same(await assigner.assign("one", CORNERS), CORNERS.assign(Corners().embed(["one"])))
    assert 8 <= process.looks < assigning.MAX_WAITS
    assigner.close()


async def test_an_embedder_that_computes_longer_than_the_deadline_is_late() -> None:
    embedder = blocked_embedder()
    assigner = ClusterAssigner(embedder, 0.005, Process(0.0, 0.0, 0.006))
    with pytest.raises(AssignmentTimeout, match="within 5 ms"):
        await assigner.assign("one", CORNERS)
    embedder.free.set()
    assigner.close()


async def test_an_embedder_that_hangs_is_late_however_little_it_computes() -> None:
    embedder = blocked_embedder()
    process = Process(0.0)
    assigner = ClusterAssigner(embedder, 0.002, process)
    with pytest.raises(AssignmentTimeout):
        await assigner.assign("one", CORNERS)
    assert process.looks == assigning.MAX_WAITS + 2  # at the start, before each wait, and at the end
    embedder.free.set()
    assigner.close()
