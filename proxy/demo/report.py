"""What the demo's models were measured to be: a table by family of prompts and one by cluster of the map."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from proxy.cli.client import ServerClient
from proxy.cli.console import say, table
from proxy.demo.arms import Arm
from proxy.jobs.records import PromptAnswer, answers_key
from proxy.settings.schema import Settings
from router_core.artifact import builtin_map
from router_core.validation.builtin import builtin_validation_set

_MOST_CLUSTERS = 8
Scores = Mapping[str, float]


def show_profiles(client: ServerClient, settings: Settings, arms: Sequence[Arm]) -> None:
    cards = [client.call("GET", f"/admin/models/{arm.name}") for arm in arms]
    names = [card["model_name"] for card in cards]
    answers = asyncio.run(read_scores(settings, [card["job"]["id"] for card in cards]))
    say()
    by_family(names, answers)
    say()
    by_cluster(cards)
    say()
    over_all(cards)


async def read_scores(settings: Settings, jobs: Sequence[str]) -> list[Scores]:
    """Per job: prompt id → score. Unlabelled answers are left out."""
    from proxy.storage.redis import Store

    store = await Store.open(settings)
    try:
        async with store.asking("read the answers") as client:
            stored = [cast(dict[str, str], await client.hgetall(answers_key(job))) for job in jobs]
    finally:
        await store.close()
    return [_labelled(answers) for answers in stored]


def _labelled(answers: Mapping[str, str]) -> Scores:
    read = {prompt: PromptAnswer.from_json(text) for prompt, text in answers.items()}
    return {prompt: answer.score for prompt, answer in read.items() if answer.score is not None}


def by_family(names: Sequence[str], scores: Sequence[Scores]) -> None:
    """Points of prompts asked; families that nobody got a point in share the last line."""
    families = {prompt.id: prompt.family for prompt in builtin_validation_set()}
    grouped: dict[str, list[list[float]]] = defaultdict(lambda: [[] for _ in names])
    for column, of_model in enumerate(scores):
        for prompt, score in of_model.items():
            grouped[families[prompt]][column].append(score)
    rows = [(family, *map(_points, cells)) for family, cells in sorted(grouped.items()) if any(map(sum, cells))]
    table(("family", *names), rows, title="By family: points of labelled prompts")
    nobody = sorted(family for family, cells in grouped.items() if not any(map(sum, cells)))
    if nobody:
        say(f"  nobody has a point in: {', '.join(nobody)}")


def _points(scores: Sequence[float]) -> str:
    return f"{sum(scores):.3g} of {len(scores)}" if scores else "-"


def by_cluster(cards: Sequence[Mapping[str, Any]]) -> None:
    """Expected error where the label weight is highest."""
    cluster_map = builtin_map()
    weight = np.mean([card["profile"]["labels"] for card in cards], axis=0)
    best = np.argsort(-weight, kind="stable")[:_MOST_CLUSTERS]
    rows = [
        (cluster_map.names[k], f"{weight[k]:.1f}", *(f"{card['profile']['errors'][k]:.2f}" for card in cards))
        for k in best
    ]
    title = f"By cluster: expected error in the {len(rows)} of {cluster_map.size} clusters with the most labels"
    table(("cluster", "labels", *(card["model_name"] for card in cards)), rows, title=title)


def over_all(cards: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        ("mean error", *(f"{card['profile']['mean_error']:.2f}" for card in cards)),
        ("labels", *(f"{sum(card['profile']['labels']):.0f}" for card in cards)),
        ("mean output tokens", *(f"{card['profile']['mean_output_tokens']:.0f}" for card in cards)),
        ("mean seconds", *(f"{card['profile']['mean_seconds']:.1f}" for card in cards)),
    ]
    table(("over all", *(card["model_name"] for card in cards)), rows)
