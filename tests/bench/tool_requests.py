"""Print what it gains to know how well models call tools: `python -m tests.bench.tool_requests FOLDER [--draws N]`.

The folder has llmrouter9.jsonl.gz, the outcomes of nine models. No public file says how well models call tools, so that
is simulated: with tools each model makes more errors, or fewer, than without, as drawn from a normal distribution of
mean 0.1 and the deviation of the row. Five of the models are measured on a few labels, of which two in fifteen offer
tools, and 2,000 other prompts are routed at λ = 0: all with tools, with the errors that tools add and without; and all
without tools, with what is due to tools taken out of the rates and with it. Printed are the points (of 100 answers)
that go right more, with 95 % bounds over the draws, and by how much the expected errors without tools are too high.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from router_core.artifact import builtin_map
from router_core.clustering import ClusterMap
from router_core.embedding import static_embedder
from router_core.evaluation.outcomes import parse_row, read_rows
from router_core.pool import CachedEstimator, Candidate, Pool
from router_core.profiles import measure
from router_core.text import truncate_middle
from router_core.types import FREE, Assignment, Doubles
from tests.conftest import CACHE

LABELS, DEVIATIONS = (60, 120, 300), (0.0, 0.1, 0.2, 0.3)
MODELS, TEST_PROMPTS, MEAN_EXCESS, TOOLS_SHARE = 5, 2_000, 0.1, 2 / 15


def lines(folder: Path, draws: int) -> Iterator[str]:
    cluster_map = builtin_map()
    prompts, scores = _outcomes(folder / "llmrouter9.jsonl.gz")
    assignment = cluster_map.assign(static_embedder(CACHE).embed(prompts))
    rng = np.random.default_rng(0)
    yield "labels  deviation  right with tools  points gained  right without tools  points gained  too high by"
    for labels in LABELS:
        for deviation in DEVIATIONS:
            drawn = np.array([_draw(rng, cluster_map, assignment, scores, labels, deviation) for _ in range(draws)])
            tools, texts = (_gain(100 * drawn[:, at], 100 * drawn[:, at + 1]) for at in (0, 2))
            too_high = [f"{100 * drawn[:, at].mean():+.1f}" for at in (4, 5)]
            yield f"{labels:6}  {deviation:9}  {tools}  {texts}  {' → '.join(too_high)}"


def _gain(before: Doubles, after: Doubles) -> str:
    gained = after - before
    bound = 1.96 * gained.std(ddof=1) / np.sqrt(len(gained))
    return f"{before.mean():16.1f}  {gained.mean():+.2f} ± {bound:.2f}"


def _outcomes(path: Path) -> tuple[list[str], Doubles]:
    rows = [parse_row(where, line) for where, line in read_rows(path)]
    names = sorted({name for row in rows for name in row.scores})
    whole = [row for row in rows if len(row.scores) == len(names)]
    return [truncate_middle(row.prompt) for row in whole], np.array([[row.scores[n] for n in names] for row in whole])


def _draw(
    rng: np.random.Generator,
    cluster_map: ClusterMap,
    assignment: Assignment,
    all_scores: Doubles,
    labels: int,
    deviation: float,
) -> tuple[float, ...]:
    """Return shares of right answers, two of requests with tools and two of requests without, and two biases."""
    rows = rng.permutation(len(all_scores))
    tested, asked = rows[:TEST_PROMPTS], rows[TEST_PROMPTS : TEST_PROMPTS + labels]
    scores = all_scores[:, rng.choice(all_scores.shape[1], MODELS, replace=False)]
    added = np.clip(rng.normal(MEAN_EXCESS, deviation, MODELS), -0.6, 0.9)
    with_tools = np.where(added > 0, scores * (1 - added), scores - (1 - scores) * added)
    offers_tools = np.arange(labels) < round(labels * TOOLS_SHARE)
    graded = np.where(offers_tools[:, None], rng.random((labels, MODELS)) < with_tools[asked], scores[asked])
    unknown = np.full(labels, np.nan)
    placed = Assignment(assignment.ids[asked], assignment.weights[asked])
    pool = Pool.build(
        [
            Candidate(
                f"{number}",
                measure(
                    cluster_map.id, cluster_map.size, placed, graded[:, number], output_tokens=unknown, seconds=unknown,
                    offers_tools=offers_tools,
                ),
                FREE,
            )
            for number in range(MODELS)
        ],
        cluster_map,
    )  # fmt: skip
    profiles = [candidate.profile for candidate in pool.candidates.values()]
    rates = CachedEstimator(cluster_map).rates(profiles)
    asked_for = Assignment(assignment.ids[tested], assignment.weights[tested])
    mixed, parted = asked_for.expected(rates), asked_for.expected(pool.errors)
    texts, tools = scores[tested], with_tools[tested]
    shares = [
        float(right[np.arange(TEST_PROMPTS), expected.argmin(axis=1)].mean())
        for right, expected in ((tools, mixed), (tools, parted + pool.tool_excess), (texts, mixed), (texts, parted))
    ]
    return *shares, *(float((expected - (1 - texts)).mean()) for expected in (mixed, parted))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--draws", type=int, default=100)
    arguments = parser.parse_args()
    for line in lines(arguments.folder, arguments.draws):
        print(line)  # noqa: T201


if __name__ == "__main__":
    main()
