"""Compare the kernels of routing from text to chosen model: `python -m tests.bench.routing_arithmetic`.

Prints the calls into NumPy, FAISS and compiled code that a prompt takes; microseconds and ratios against the number of
models and of clusters; and, over random pools and requests, how many vectors, weights and choices differ. Kernels take
turns in one process, a slice of prompts each, and ratios are taken prompt by prompt: they hold on a machine whose speed
drifts. `--before REF` adds the code of a commit. `--texts` takes prompts from files: JSON lines with a member `prompt`.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import io
import json
import statistics
import subprocess
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from proxy.cli import console
from router_core.text import truncate_middle
from router_core.types import Floats
from router_core.validation.families.registry import builtin_validation_set
from tests.bench.numpy_calls import COMPILED, FAISS, NUMPY, counted, load_copy
from tests.bench.prompts import generated_prompts
from tests.conftest import CACHE
from tests.test_house import ROOT

MODELS = (2, 10, 100, 1_000)
CLUSTERS = (16, 64, 1_024)
POOL_SIZES = (2, 3, 5, 10, 30, 100, 300, 1_000)
LAMBDAS = (0.0, 0.02, 0.1, 0.4, 5.0, 1e12)
# Prompts between two turns.
SLICE = 25
# What other work of a request has put into the caches in between.
EVICTED_BYTES = 4 << 20


@dataclass(frozen=True)
class Core:
    """`router_core`, or a copy of it, with one of its kernels."""

    title: str
    package: str
    kernel: str | None = None

    def __getattr__(self, module: str) -> Any:
        return import_module(f"{self.package}.{module}")

    def chosen(self) -> Core:
        """Make it use its kernel from now on."""
        if self.kernel is not None:
            self.kernels.use(self.kernels.NUMPY if self.kernel == "NUMPY" else self.kernels.compiled())
        return self

    def embedder(self, folder: Path) -> Any:
        return self.chosen().embedding.static_embedder(folder, console.echo_err)

    def cluster_map(self, centroids: Floats, embedder: Any) -> Any:
        made = self.chosen().clustering.ClusterMap(centroids, embedder_id=embedder.id)
        made.assign(centroids[:1])  # makes what one prompt is assigned with
        return made


class Routing:
    """One core, one map, one pool: what a snapshot gives to requests."""

    def __init__(self, core: Core, embedder: Any, centroids: Floats, models: int, seed: int) -> None:
        self._embedder = embedder
        self._eligible, self._rank = core.eligibility.eligible, core.scoring.rank
        self._has_query = hasattr(core.clustering.ClusterMap, "query")
        self.map = core.cluster_map(centroids, embedder)
        self.pool = a_pool(core, self.map, models, seed)

    def place(self, text: str) -> tuple[Any, Any]:
        vector = self._embedder.embed_if_short(text, *((self.map.query,) if self._has_query else ()))
        if vector is None:
            vector = self._embedder.embed([text])
        return vector, self.map.assign(vector)

    def rank(self, assignment: Any, needs: Any, params: Any, **allowed: Any) -> Any:
        return self._rank(self._eligible(self.pool, needs, **allowed), assignment, needs, params)

    def choose(self, text: str, needs: Any, params: Any) -> str:
        return str(self.rank(self.place(text)[1], needs, params).chosen)


def a_pool(core: Core, cluster_map: Any, models: int, seed: int) -> Any:
    """Lay out random models. A fifth are alike with another one; in larger pools some have no profile or no price."""
    rng, candidates = np.random.default_rng(seed), list[Any]()
    types = core.types
    for number in range(models):
        if candidates and rng.random() < 0.2:
            twin = candidates[rng.integers(len(candidates))]
            candidates.append(core.pool.Candidate(f"m{number:04}", twin.profile, twin.price, twin.capabilities))
            continue
        rates = {"errors": rng.uniform(size=cluster_map.size).tolist(), "labels": [2.0] * cluster_map.size}
        lengths = {"mean_output_tokens": rng.uniform(20, 2_000), "mean_seconds": rng.uniform(0.2, 20)}
        profile = core.profiles.Profile.from_json({"map": cluster_map.id, **rates, **lengths})
        tiers = ((4_000, types.Price(2e-6, 2e-5)),) if rng.random() < 0.1 else ()
        price = types.Price(*rng.uniform(0, 1e-5, 2).tolist(), cache_read_input_token_cost=1e-8, tiers=tiers)
        unknown = models > 4 and rng.random() < 0.1
        limit = types.Capabilities(max_output_tokens=int(rng.integers(100, 5_000)) if rng.random() < 0.5 else None)
        candidates.append(
            core.pool.Candidate(
                f"m{number:04}",
                None if unknown and number % 2 else profile,
                None if unknown and not number % 2 else price,
                limit,
            )
        )
    return core.pool.Pool.build(candidates, cluster_map)


def a_request(core: Core, rng: Random, names: Sequence[str]) -> tuple[Any, Any, dict[str, Any]]:
    """Draw a request: its requirements, what it pays, and which models it may use."""
    tokens = rng.choice((0, 1, 50, 400, 3_000, 9_000))
    needs = core.types.Requirements(
        prompt_tokens=tokens,
        max_output_tokens=rng.choice((None, None, 1, 100, 1_000)),
        limit_is_cap=rng.random() < 0.5,
        answers=rng.choice((1, 1, 1, 3)),
    )
    params = core.scoring.ScoringParams(
        lambda_=rng.choice(LAMBDAS),
        latency_weight=rng.choice((0.0, 0.0, 1e-4)),
        max_cost_usd=rng.choice((None, None, None, 0.01)),
        cost_unit=rng.choice(("reference", "reference", "cents")),
        tie=rng.choice((0.005, 0.005, 0.0)),
        cached=rng.choice((None, None, (rng.choice(names), rng.randrange(tokens + 1)))),
    )
    allowed: dict[str, Any] = {"allowed": rng.sample(names, rng.randint(1, len(names)))} if rng.random() < 0.3 else {}
    if rng.random() < 0.2:
        allowed["cooling_down"] = rng.sample(names, 1)
    return needs, params, allowed


def some_centroids(clusters: int, dimension: int) -> Floats:
    made = np.random.default_rng(clusters).normal(size=(clusters, dimension))
    return np.asarray(made / np.linalg.norm(made, axis=1, keepdims=True), dtype=np.float32)


def print_calls(cores: Sequence[Core], texts: Sequence[str], folder: Path) -> None:
    rows = []
    for core in cores:
        embedder = core.embedder(folder)
        routing = Routing(core, embedder, some_centroids(64, embedder.dimension), 10, 0)
        # Models that are all eligible, as in most deployments.
        names = [routing.pool.names[row] for row in routing.pool.routable_rows.tolist()]
        kept = [routing.pool.candidates[name] for name in names]
        routing.pool = core.chosen().pool.Pool.build(kept, routing.map)
        needs, params = core.types.Requirements(prompt_tokens=200), core.scoring.ScoringParams()
        found = list[Counter[str]]()
        for text in texts:
            counted.clear()
            routing.choose(text, needs, params)
            found.append(Counter(counted))
        rows.append(
            (
                core.title,
                *(f"{statistics.median(each[kind] for each in found):.0f}" for kind in (NUMPY, FAISS, COMPILED)),
            )
        )
    console.table(("kernel", NUMPY, FAISS, COMPILED), rows, title="calls from text to chosen model, median of prompts")


def print_times(
    cores: Sequence[Core], texts: Sequence[str], folder: Path, models: Sequence[int], clusters: Sequence[int]
) -> None:
    embedders = [core.embedder(folder) for core in cores]
    evicted = np.zeros(EVICTED_BYTES, dtype=np.uint8)
    rows = []
    for size in clusters:
        for count in models:
            centroids = some_centroids(size, embedders[0].dimension)
            choices = [
                decision_of(core, Routing(core, embedder, centroids, count, count))
                for core, embedder in zip(cores, embedders, strict=True)
            ]
            for cold in (False, True):
                times = in_turns(choices, texts, evicted if cold else None)
                ratios = [statistics.median(np.divide(each, times[0]).tolist()) for each in times]
                cells = [
                    f"{statistics.median(each):.1f} ({ratio:.2f})" for each, ratio in zip(times, ratios, strict=True)
                ]
                rows.append((f"{count:,}", f"{size:,}", "cold" if cold else "warm", *cells))
    columns = ("models", "K", "caches", *(core.title for core in cores))
    console.table(columns, rows, title="µs a prompt, and in brackets the ratio to the first; medians over prompts")


def decision_of(core: Core, routing: Routing) -> Callable[[str], str]:
    needs, params = core.types.Requirements(prompt_tokens=200), core.scoring.ScoringParams()
    return lambda text: routing.choose(text, needs, params)


def in_turns(choices: Sequence[Callable[[str], str]], texts: Sequence[str], evicted: Any | None) -> list[list[float]]:
    """Return, for each, the µs of every prompt. Whoever comes first in a slice comes last in the next."""
    times: list[list[float]] = [[] for _ in choices]
    order = list(range(len(choices)))
    gc.collect()
    gc.freeze()  # as the server does
    for start in range(0, len(texts), SLICE):
        for turn in order:
            choose = choices[turn]
            for text in texts[start : start + SLICE]:
                if evicted is not None:
                    evicted[::64] += 1
                began = time.perf_counter_ns()
                choose(text)
                times[turn].append((time.perf_counter_ns() - began) / 1e3)
        order.append(order.pop(0))
    return times


@dataclass
class Difference:
    """What was compared with the first core, and how far it was off."""

    prompts: int = 0
    vectors: int = 0
    nearest: int = 0
    weights: int = 0
    largest: float = 0.0
    choices: int = 0
    scores: int = 0
    refused: int = 0


def print_differences(cores: Sequence[Core], texts: Sequence[str], folder: Path) -> None:
    """Route each text in a pool of each size, by a request of its own."""
    embedders = [core.embedder(folder) for core in cores]
    centroids = some_centroids(64, embedders[0].dimension)
    pools = [
        [Routing(core, embedder, centroids, size, size) for core, embedder in zip(cores, embedders, strict=True)]
        for size in POOL_SIZES
    ]
    found = [Difference() for _ in cores[1:]]
    for number, text in enumerate(texts):
        placed = [routing.place(text) for routing in pools[0]]
        for seen, (vector, assignment) in zip(found, placed[1:], strict=True):
            note_placed(seen, placed[0][0], vector, placed[0][1], assignment)
        for size, routings in zip(POOL_SIZES, pools, strict=True):
            results = [
                result_of(core, routing, assignment, Random(f"{number} {size}"))
                for core, routing, (_, assignment) in zip(cores, routings, placed, strict=True)
            ]
            for seen, result in zip(found, results[1:], strict=True):
                seen.choices += result[0] != results[0][0]
                seen.scores += result[1] != results[0][1]
                seen.refused += result[0] is None
    rows = [
        (
            f"{core.title} against {cores[0].title}",
            *(
                f"{seen.prompts:,}",
                f"{seen.vectors:,}",
                f"{seen.nearest:,}",
                f"{seen.weights:,}",
                f"{seen.largest:.1e}",
            ),
            *(f"{seen.prompts * len(POOL_SIZES):,}", f"{seen.choices:,}", f"{seen.scores:,}", f"{seen.refused:,}"),
        )
        for core, seen in zip(cores[1:], found, strict=True)
    ]
    columns = ("differ", "prompts", "vectors", "clusters", "weights", "largest", "choices made", "choices", "scores",
               "refused")  # fmt: skip
    console.table(columns, rows, title=f"differences, over pools of {', '.join(map(str, POOL_SIZES))} models")


def note_placed(seen: Difference, first: Floats, vector: Floats, expected: Any, assignment: Any) -> None:
    seen.prompts += 1
    seen.vectors += first.tobytes() != vector.tobytes()
    seen.nearest += expected.ids.tobytes() != assignment.ids.tobytes()
    seen.weights += expected.weights.tobytes() != assignment.weights.tobytes()
    seen.largest = max(seen.largest, float(np.abs(expected.weights - assignment.weights).max(initial=0.0)))


def result_of(core: Core, routing: Routing, assignment: Any, rng: Random) -> tuple[str | None, bytes]:
    """Return the chosen model, None if there is none, and the figures of all."""
    needs, params, allowed = a_request(core, rng, routing.pool.names)
    try:
        decision = routing.rank(assignment, needs, params, **allowed)
    except core.errors.NoEligibleModel:
        return None, b""
    table = decision.table
    figures = [column.tobytes() for column in (table.errors, table.costs, table.scores, table.costs_usd)]
    return str(decision.chosen), b"".join(figures)


def texts_of(arguments: argparse.Namespace) -> list[str]:
    if not arguments.texts:
        own = [prompt.text for prompt in builtin_validation_set()]
        return [truncate_middle(text) for text in (*own, *generated_prompts(arguments.prompts))]
    return [truncate_middle(text) for path in arguments.texts for text in read_texts(path)]


def read_texts(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["prompt"]


def source_at(ref: str, folder: Path) -> Path:
    """Unpack `router_core` of a commit."""
    packed = subprocess.run(
        ["git", "-C", str(ROOT), "archive", ref, "router_core"], capture_output=True, check=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder / "router_core"


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="uniroute-bench-") as name:
        folder = Path(name)
        source = ROOT / "router_core"
        cores, counting = list[Core](), list[Core]()
        if arguments.before:
            earlier = source_at(arguments.before, folder / "source")
            load_copy(earlier, folder, "core_before")
            load_copy(earlier, folder, "counted_before", counting=True)
            cores.append(Core(arguments.before, "core_before"))
            counting.append(Core(arguments.before, "counted_before"))
        load_copy(source, folder, "counted_core", counting=True)
        for title, kernel in (("NumPy", "NUMPY"), ("compiled", "COMPILED")):
            if kernel == "COMPILED" and import_module("router_core.kernels").compiled() is None:
                console.echo_err("the compiled kernels are not built here; `make install` builds them")
                continue
            cores.append(Core(title, "router_core", kernel))
            counting.append(Core(title, "counted_core", kernel))
        texts = texts_of(arguments)
        print_calls(counting, texts[:50], arguments.embedder)
        if len(cores) > 1:
            print_differences(cores, texts, arguments.embedder)
        if arguments.models:
            timed = Random(0).sample(texts, min(len(texts), arguments.timed))
            print_times(cores, timed, arguments.embedder, arguments.models, arguments.clusters)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, nargs="*", default=MODELS, help="none: no times are measured")
    parser.add_argument("--clusters", type=int, nargs="+", default=CLUSTERS)
    parser.add_argument("--prompts", type=int, default=1_000, help="generated, beside the validation prompts")
    parser.add_argument("--timed", type=int, default=1_000, help="prompts that are timed, of all")
    parser.add_argument("--texts", type=Path, nargs="+", help="files of prompts in place of those")
    parser.add_argument("--before", metavar="REF", help="a commit to compare with")
    parser.add_argument("--embedder", type=Path, default=CACHE, help="where an embedding table is, or is made")
    return parser.parse_args()


if __name__ == "__main__":
    main()
