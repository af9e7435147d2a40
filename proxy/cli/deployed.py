"""What a running server routes with: its cluster map, its embedder, and the profiles and prices of its models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from proxy.cli.client import ServerClient, admin_client
from proxy.cli.console import CommandError, Progress, load_embedder, progress
from proxy.routing.requirements import routing_text
from proxy.server.startup import load_cluster_map
from proxy.settings.model_config import ModelInfo
from proxy.settings.schema import Settings
from proxy.storage.price_map import PriceMap, bundled_price_map
from proxy.storage.snapshot import capabilities_of
from router_core.clustering import ClusterMap
from router_core.evaluation.deployed import CommonModels, evaluate_deployed, read_deployed
from router_core.evaluation.study import Results
from router_core.fitting import embed_prompts
from router_core.pool import Candidate, Pool
from router_core.profiles import Profile
from router_core.types import Assignment, Embedder, Floats, Price, price_field

Messages = Sequence[Mapping[str, str]]


def load_map_and_embedder(settings: Settings) -> tuple[ClusterMap, Embedder]:
    """Load both as the settings name them. Raises CommandError where the two do not belong together."""
    cluster_map, embedder = load_cluster_map(settings), load_embedder(settings.embedder, settings.data_dir)
    if embedder.id != cluster_map.embedder_id:
        raise CommandError(
            f"the map was fitted with the embedder {cluster_map.embedder_id}, but `embedder: {settings.embedder}` is"
            f" {embedder.id}; give the configuration of the server"
        )
    return cluster_map, embedder


def load_deployment(settings: Settings, url: str | None) -> tuple[ClusterMap, Embedder, Pool]:
    """Load map, embedder and models of a running server. Raises CommandError; BadArgument without its key."""
    with admin_client(url) as server:
        cluster_map, embedder = load_map_and_embedder(settings)
        return cluster_map, embedder, deployed_pool(server, cluster_map)


def deployed_pool(server: ServerClient, cluster_map: ClusterMap) -> Pool:
    """Return every model of the server, with the error rates that it routes by.

    Lengths of answers are those of the profiles, without live traffic.

    Raises:
        CommandError: the server has no models, or routes with another map.
    """
    listed = server.call("GET", "/admin/models")["models"]
    cards = [server.call("GET", f"/admin/models/{card['model_name']}") for card in listed]
    if not cards:
        raise CommandError(f"the server at {server.url} has no models; add some with `uniroute models add`")
    served = {card["model_name"]: card["profile"]["errors"] for card in cards if card["profile"]}
    _check_map(cards, cluster_map)
    price_map = bundled_price_map()
    pool = Pool.build([_candidate(card, price_map) for card in cards], cluster_map)
    unmeasured = np.full(cluster_map.size, np.nan)
    return replace(pool, errors=np.array([served.get(name, unmeasured) for name in pool.names], dtype=np.float64))


def _check_map(cards: list[Mapping[str, Any]], cluster_map: ClusterMap) -> None:
    for card in cards:
        if card["profile"] and card["profile"]["map"] != cluster_map.id:
            raise CommandError(
                f"the server's profile of {card['model_name']} was measured on map {card['profile']['map']}, but the"
                f" map of the settings here is {cluster_map.id}; give the configuration of the server (--config)"
            )


def _candidate(card: Mapping[str, Any], price_map: PriceMap) -> Candidate:
    return Candidate(
        name=card["model_name"],
        profile=Profile.from_json(card["profile"]) if card["profile"] else None,
        price=price_of(card),
        capabilities=capabilities_of(
            ModelInfo.model_validate(card["model_info"]), price_map.find(str(card["litellm_params"]["model"]))
        ),
        excluded="paused" if card.get("paused") else None,
    )


def price_of(card: Mapping[str, Any]) -> Price | None:
    """Return the price that a model's card states as in force; None where it is not known."""
    stated = card["price"]
    return Price.from_fields({name: cost for name, cost in stated.items() if price_field(name)}) if stated else None


def evaluate_deployment(path: Path, settings: Settings, url: str | None) -> tuple[Results, CommonModels]:
    """Evaluate the deployed models on an outcomes file, and say which models the file and the server have in common.

    Answers are billed at the prices in force.

    Raises:
        CommandError: as `deployed_pool` does; and whatever `read_deployed` and `evaluate_deployed` raise.
    """
    cluster_map, embedder, pool = load_deployment(settings, url)
    outcomes, common = read_deployed(path, pool)
    with progress() as bars:
        assignment = assign_conversations(map(user_turn, outcomes.prompts), embedder, cluster_map, bars)
    return evaluate_deployed(outcomes, pool, assignment, outcomes_name=path.name, embedder_id=embedder.id), common


def user_turn(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def embed_conversations(prompts: Iterable[Messages], embedder: Embedder, bars: Progress) -> Floats:
    """Return (n, d) vectors of n conversations, each embedded by the text that a server would route it by."""
    return embed_prompts(_texts_of(prompts), embedder, bars.update)


def assign_conversations(
    prompts: Iterable[Messages], embedder: Embedder, cluster_map: ClusterMap, bars: Progress
) -> Assignment:
    """Assign n conversations to clusters, each by the text that a server would route it by."""
    texts = _texts_of(prompts)
    return cluster_map.assign(embed_prompts(texts, embedder, bars.update), cluster_map.surface_of(texts))


def _texts_of(prompts: Iterable[Messages]) -> list[str]:
    return [routing_text(messages) for messages in prompts]
