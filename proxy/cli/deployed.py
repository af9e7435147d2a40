"""What a running server routes with: its map, opened here, and its models with their profiles and prices. Read only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxy.cli.console import CommandError

if TYPE_CHECKING:
    from proxy.cli.client import ServerClient
    from proxy.settings.schema import Settings
    from proxy.storage.price_map import Catalog
    from router_core.clustering import ClusterMap
    from router_core.evaluation.deployed_outcomes import Common
    from router_core.evaluation.results import Results
    from router_core.pool import Candidate, Pool
    from router_core.types import Embedder, Price


def opened_map(settings: Settings) -> tuple[ClusterMap, Embedder]:
    """The map and the embedder of the settings. Raises CommandError where the two do not belong together."""
    from proxy.app import open_map
    from proxy.cli.inputs import opened_embedder

    cluster_map, embedder = open_map(settings), opened_embedder(settings.embedder, settings.data_dir)
    if embedder.id != cluster_map.embedder_id:
        raise CommandError(
            f"the map was fitted with the embedder {cluster_map.embedder_id}, but `embedder: {settings.embedder}` is"
            f" {embedder.id}; give the configuration of the server"
        )
    return cluster_map, embedder


def opened_deployment(settings: Settings, url: str | None) -> tuple[ClusterMap, Embedder, Pool]:
    """The map, the embedder and the models of a running server. Raises CommandError; BadArgument without its key."""
    from proxy.cli.options import admin_client

    with admin_client(url) as server:
        cluster_map, embedder = opened_map(settings)
        return cluster_map, embedder, deployed_pool(server, cluster_map)


def deployed_pool(server: ServerClient, cluster_map: ClusterMap) -> Pool:
    """Every model of the server, with the error rates that it serves. Lengths are as measured, without live traffic.

    Raises:
        CommandError: the server has no models, or routes with another map.
    """
    import numpy as np

    from proxy.storage.price_map import bundled_catalog
    from router_core.pool import Pool

    listed = server.call("GET", "/admin/models")["models"]
    cards = [server.call("GET", f"/admin/models/{card['model_name']}") for card in listed]
    if not cards:
        raise CommandError(f"the server at {server.url} has no models; add some with `uniroute models add`")
    served = {card["model_name"]: card["profile"]["errors"] for card in cards if card["profile"]}
    _check_map(cards, cluster_map)
    catalog = bundled_catalog()
    pool = Pool.build([_candidate(card, catalog) for card in cards], cluster_map)
    unmeasured = np.full(cluster_map.size, np.nan)
    return replace(pool, errors=np.array([served.get(name, unmeasured) for name in pool.names], dtype=np.float64))


def _check_map(cards: list[Mapping[str, Any]], cluster_map: ClusterMap) -> None:
    for card in cards:
        if card["profile"] and card["profile"]["map"] != cluster_map.id:
            raise CommandError(
                f"the server's profile of {card['model_name']} was measured on map {card['profile']['map']}, but the"
                f" map of the settings here is {cluster_map.id}; give the configuration of the server (--config)"
            )


def _candidate(card: Mapping[str, Any], catalog: Catalog) -> Candidate:
    from proxy.settings.models import ModelInfo
    from proxy.storage.snapshot import capabilities_of
    from router_core.pool import Candidate
    from router_core.profiles import Profile

    return Candidate(
        name=card["model_name"],
        profile=Profile.from_json(card["profile"]) if card["profile"] else None,
        price=price_of(card),
        capabilities=capabilities_of(
            ModelInfo.model_validate(card["model_info"]), catalog.find(str(card["litellm_params"]["model"]))
        ),
    )


def deployed_results(path: Path, settings: Settings, url: str | None) -> tuple[Results, Common]:
    """The deployed models on an outcomes file, and which of the file's and the server's models those are.

    Billed at the prices of now. Raises CommandError as above, and what `read_deployed` and `evaluate_deployed` raise.
    """
    from proxy.cli import console
    from proxy.cli.traffic import embedded, user_turn
    from router_core.evaluation.deployed import evaluate_deployed
    from router_core.evaluation.deployed_outcomes import read_deployed

    cluster_map, embedder, pool = opened_deployment(settings, url)
    outcomes, common = read_deployed(path, pool)
    with console.progress() as bars:
        assignment = cluster_map.assign(embedded(map(user_turn, outcomes.prompts), embedder, bars))
    return evaluate_deployed(outcomes, pool, assignment, outcomes_name=path.name, embedder_id=embedder.id), common


def price_of(card: Mapping[str, Any]) -> Price | None:
    """The price in force by a model's card; None where it is not known."""
    from router_core.types import Price, price_field

    stated = card["price"]
    return Price.of({name: cost for name, cost in stated.items() if price_field(name)}) if stated else None
