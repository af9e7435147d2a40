"""The deferral curve of this deployment, on validation prompts weighted and sized as its traffic is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from proxy.profiling.grading import AssignedPrompts
from proxy.routing.requirements import requirements_of
from proxy.server.dependencies import AppState
from proxy.storage.snapshot import RoutingSnapshot, TrafficStats
from router_core.deferral import CurvePoint, DeferralCurve, SingleModel, deferral_curve
from router_core.estimators import ESTIMATORS
from router_core.scoring import ScoringParams
from router_core.types import Doubles

# Answers below which the traffic has no mix of its own yet.
MIN_ANSWERS = 50.0

# How old a curve may be: traffic and prices move it slowly.
MAX_AGE_S = 30.0


@dataclass(frozen=True)
class Traffic:
    """What is known of this deployment's requests. None: too little yet, and the validation prompts stand for it."""

    answers: float
    mix: Doubles | None
    """(K,) how much of it is in each cluster."""
    mean_prompt_tokens: float | None


@dataclass(frozen=True)
class DrawnCurve:
    """A curve with the points that are drawn."""

    version: int
    """Of the routing state that it was made from."""
    made_at: float
    """Monotonic seconds."""
    traffic: Traffic
    curve: DeferralCurve
    points: list[CurvePoint]
    singles: list[SingleModel]


class Curves:
    """Compute the curve when somebody looks at it, in a thread, and keep it for a while."""

    def __init__(self) -> None:
        self._last: DrawnCurve | None = None
        self._computing = asyncio.Lock()

    async def current(self, state: AppState, traffic: Traffic) -> DrawnCurve:
        """Return the curve of the current profiles and prices. Raises NoEligibleModel, InvalidInput."""
        async with self._computing:
            last, snapshot = self._last, state.snapshots.current
            if last and last.version == snapshot.version and time.monotonic() - last.made_at < MAX_AGE_S:
                return last
            prompts = await state.jobs.validation_prompts()
            self._last = await asyncio.to_thread(partial(_draw, state, snapshot, prompts, traffic))
            return self._last


def traffic_of(stats: TrafficStats, requests: Mapping[str, float], prompt_tokens: float) -> Traffic:
    """Weigh each model's latest answers, which are as many of every busy model, by its requests.

    Args:
        requests, prompt_tokens: of this server, ever since it started.
    """
    mixes = {model: mix for model, mix in stats.mixes().items() if requests.get(model) and mix.sum() > 0}
    answers = sum(requests[model] for model in mixes)
    if answers < MIN_ANSWERS:
        return Traffic(answers, None, None)
    mix = sum((requests[model] * each / each.sum() for model, each in mixes.items()), np.zeros(()))
    mean = prompt_tokens / sum(requests.values())
    return Traffic(answers, np.asarray(mix), mean if mean >= 1 else None)


def _draw(state: AppState, snapshot: RoutingSnapshot, prompts: AssignedPrompts, traffic: Traffic) -> DrawnCurve:
    settings = state.settings
    tokens = np.array(
        [requirements_of({"messages": list(prompt.messages)}).prompt_tokens for prompt in prompts.prompts], dtype=float
    )
    if traffic.mean_prompt_tokens is not None:
        tokens = np.maximum(tokens * (traffic.mean_prompt_tokens / tokens.mean()), 1.0).round()
    curve = deferral_curve(
        snapshot.pool,
        snapshot.profiles,
        snapshot.cluster_map,
        prompts.assignment,
        tokens,
        mix=traffic.mix,
        estimator=ESTIMATORS[settings.recipe],
        params=ScoringParams(
            latency_weight=settings.latency_weight, cost_unit=settings.cost_unit, reference=settings.reference_price
        ),
    )
    return DrawnCurve(snapshot.version, time.monotonic(), traffic, curve, curve.points(), curve.singles())
