"""What a study is to do. How it is done is study.py."""

from __future__ import annotations

from dataclasses import dataclass

from router_core.errors import InvalidInput
from router_core.evaluation.outcomes import Outcomes

TEST_SHARE = 0.3
LABELS = (25, 50, 100, 200, 400)
TRIALS = 200
UNSEEN = 1 / 3


@dataclass(frozen=True, slots=True)
class Plan:
    """UniRoute's protocol (arXiv 2502.08773, section 6): some models are new, and seen through a few answers only."""

    outcomes_name: str
    embedder_id: str
    labels: tuple[int, ...] = LABELS
    """N, ascending: how many of the train prompts the new models are asked."""
    trials: int = TRIALS
    seed: int = 0
    unseen: float = UNSEEN
    """The share of the models that is new; 0: all are, and none is known."""

    def __post_init__(self) -> None:
        if not self.labels or min(self.labels) < 1 or list(self.labels) != sorted(set(self.labels)):
            raise InvalidInput(f"labels must be ascending whole numbers, 1 or more; got {self.labels}")
        if self.trials < 1:
            raise InvalidInput(f"trials must be 1 or more; got {self.trials}")
        if not 0 <= self.unseen <= 1:
            raise InvalidInput(f"unseen must be from 0 to 1; got {self.unseen}")

    def new_models(self, models: int) -> int:
        """How many of so many models are new in a trial."""
        return new_models(self.unseen, models)

    def check(self, outcomes: Outcomes) -> None:
        """Raises InvalidInput where there is too little to follow the plan."""
        models, new = len(outcomes.models), self.new_models(len(outcomes.models))
        if new < 2:
            raise InvalidInput(
                f"unseen={self.unseen:g} of {models} models leaves {new} new one, and routing needs two to choose from:"
                " give --unseen 0, where all are new, or a larger share"
            )
        prompts = len(outcomes.prompts)
        train = prompts - tested_prompts(prompts)
        if self.labels[-1] > train:
            raise InvalidInput(
                f"{self.labels[-1]} labels are more than the {train} prompts that are left to train on, of {prompts}"
                " that differ: give smaller --labels, or more prompts"
            )


def new_models(unseen: float, models: int) -> int:
    return models if unseen == 0 else max(1, round(unseen * models))


def usual_unseen(models: int) -> float:
    """A third; 0 where that leaves nothing to choose from."""
    return UNSEEN if new_models(UNSEEN, models) >= 2 else 0.0


def usual_labels(prompts: int) -> tuple[int, ...]:
    """Those of LABELS that the train prompts suffice for, of so many in all; at least the first."""
    train = prompts - tested_prompts(prompts)
    return tuple(labels for labels in LABELS if labels <= train) or LABELS[:1]


def tested_prompts(prompts: int) -> int:
    """How many of so many prompts are test prompts."""
    return max(1, round(TEST_SHARE * prompts))
