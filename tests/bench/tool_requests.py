"""Print what it gains to know how well models call tools: `python -m tests.bench.tool_requests FOLDER [--draws N]`.

The folder has llmrouter9.jsonl.gz, the outcomes of nine models. No public file says how well models call tools, so that
is simulated: with tools each model makes more errors, or fewer, than without, as drawn from a normal distribution of
mean 0.1 and the deviation of the row. Five of the models are measured on a few labels, of which two in fifteen offer
tools, and 2,000 other prompts, all with tools, are routed at λ = 0, with the errors that tools add and without. Printed
are the points (of 100 answers) that go right more, with 95 % bounds over the draws.
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
from router_core.pool import Candidate, Pool
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
    yield "labels  deviation  right without  points gained"
    for labels in LABELS:
        for deviation in DEVIATIONS:
            pairs = np.array([_draw(rng, cluster_map, assignment, scores, labels, deviation) for _ in range(draws)])
            gained = 100 * (pairs[:, 1] - pairs[:, 0])
            bound = 1.96 * gained.std(ddof=1) / np.sqrt(draws)
            right = 100 * pairs[:, 0].mean()
            yield f"{labels:6}  {deviation:9}  {right:13.1f}  {gained.mean():+.2f} ± {bound:.2f}"


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
) -> tuple[float, float]:
    """Return the shares of right answers without and with what tools add."""
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
    expected = Assignment(assignment.ids[tested], assignment.weights[tested]).expected(pool.errors)
    right = with_tools[tested]
    chosen = [(expected + excess).argmin(axis=1) for excess in (0.0, pool.tool_excess)]
    without, knowing = (float(right[np.arange(TEST_PROMPTS), each].mean()) for each in chosen)
    return without, knowing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--draws", type=int, default=100)
    arguments = parser.parse_args()
    for line in lines(arguments.folder, arguments.draws):
        print(line)  # noqa: T201


if __name__ == "__main__":
    main()
