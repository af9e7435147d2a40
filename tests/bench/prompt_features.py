"""Print what surface features and the multilingual table gain: `python -m tests.bench.prompt_features OUTCOMES PRICES`.

Each trial is one of `uniroute evaluate`, with the product alone: as it is, without surface features (all prompts then
have those of an empty text), and with the vectors of the multilingual table. Differences are trial by trial, in points
of Area. `--trials N`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from router_core.embedding import STATIC_KINDS, static_embedder
from router_core.evaluation.curves import Difference, paired_difference
from router_core.evaluation.outcomes import Outcomes, read_outcomes
from router_core.evaluation.parallel import single_threaded
from router_core.evaluation.study import ServedTrial, trial_metrics
from router_core.evaluation.trials import Plan, Trial, default_labels, default_unseen, draw_trial
from router_core.text import truncate_middle
from router_core.types import Doubles, Floats
from tests.conftest import CACHE


def areas(trial: Trial, labels: tuple[int, ...]) -> Doubles:
    """Return the product's Area for each number of labels."""
    served, baselines = ServedTrial(trial), trial.test.baselines()
    pools = (served.pool(trial.sample(trial.order[:count])) for count in labels)
    return np.array([trial_metrics(served.curve(pool), baselines).metrics.area for pool in pools])


def without_surface(trial: Trial) -> Trial:
    history, test = trial.history, trial.test
    return replace(
        trial,
        history=replace(history, texts=[""] * len(history.texts)),
        test=replace(test, texts=[""] * len(test.texts)),
    )


Draw = Callable[[int], Trial]


def draws_of(outcomes: Outcomes, plan: Plan) -> dict[str, Draw]:
    texts = [truncate_middle(prompt) for prompt in outcomes.prompts]
    vectors: dict[str, Floats] = {name: static_embedder(CACHE, name=name).embed(texts) for name in STATIC_KINDS}
    drawn = {name: lambda number, name=name: draw_trial(outcomes, vectors[name], plan, number) for name in vectors}
    return drawn | {"no surface": lambda number: without_surface(drawn["static"](number))}


def lines(outcomes: Outcomes, trials: int) -> Iterator[str]:
    unseen = default_unseen(len(outcomes.models))
    plan = Plan("", "static", default_labels(len(outcomes.prompts)), trials, unseen=unseen)
    found: dict[str, list[Doubles]] = {}
    for name, draw in draws_of(outcomes, plan).items():
        found[name] = [areas(draw(number), plan.labels) for number in range(trials)]
    yield "labels  Area  surface features gain      multilingual less static"
    for column, labels in enumerate(plan.labels):
        by_name = {name: np.array(rows)[:, column] for name, rows in found.items()}
        gained = paired_difference(by_name["static"], by_name["no surface"], seed=0)
        changed = paired_difference(by_name["multilingual"], by_name["static"], seed=0)
        yield f"{labels:6} {100 * np.nanmean(by_name['static']):6.2f}  {_points(gained)}   {_points(changed)}"


def _points(difference: Difference) -> str:
    return f"{100 * difference.mean:+.2f} [{100 * difference.low:+.2f}, {100 * difference.high:+.2f}]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("outcomes", type=Path)
    parser.add_argument("prices", type=Path)
    parser.add_argument("--trials", type=int, default=200)
    arguments = parser.parse_args()
    with single_threaded():
        for line in lines(read_outcomes(arguments.outcomes, arguments.prices), arguments.trials):
            print(line, flush=True)  # noqa: T201
