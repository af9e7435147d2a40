from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxy.cli.console import CommandError
from proxy.cli.options import ConfigOption, DataDirOption, JsonOption, UrlOption

if TYPE_CHECKING:
    from proxy.cli.options import ServerClient
    from proxy.settings.schema import Settings
    from proxy.storage.price_map import PriceMap
    from router_core.clustering import ClusterMap
    from router_core.evaluation.deployed import CommonModels
    from router_core.evaluation.outcomes import Outcomes
    from router_core.evaluation.study import Results
    from router_core.evaluation.trials import Plan
    from router_core.pool import Candidate, Pool
    from router_core.types import Embedder, Price


def opened_map(settings: Settings) -> tuple[ClusterMap, Embedder]:
    """The map and the embedder of the settings. Raises CommandError where the two do not belong together."""
    from proxy.app import load_cluster_map
    from proxy.cli.console import opened_embedder

    cluster_map, embedder = load_cluster_map(settings), opened_embedder(settings.embedder, settings.data_dir)
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


def _candidate(card: Mapping[str, Any], catalog: PriceMap) -> Candidate:
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


def deployed_results(path: Path, settings: Settings, url: str | None) -> tuple[Results, CommonModels]:
    """The deployed models on an outcomes file, and which of the file's and the server's models those are.

    Billed at the prices of now. Raises CommandError as above, and what `read_deployed` and `evaluate_deployed` raise.
    """
    from proxy.cli import console
    from proxy.cli.calibrate import embedded, user_turn
    from router_core.evaluation.deployed import evaluate_deployed, read_deployed

    cluster_map, embedder, pool = opened_deployment(settings, url)
    outcomes, common = read_deployed(path, pool)
    with console.progress() as bars:
        assignment = cluster_map.assign(embedded(map(user_turn, outcomes.prompts), embedder, bars))
    return evaluate_deployed(outcomes, pool, assignment, outcomes_name=path.name, embedder_id=embedder.id), common


def price_of(card: Mapping[str, Any]) -> Price | None:
    """The price in force by a model's card; None where it is not known."""
    from router_core.types import Price, price_field

    stated = card["price"]
    return Price.from_fields({name: cost for name, cost in stated.items() if price_field(name)}) if stated else None


OUTCOMES_HELP = (
    "Which model answered which prompt how well (JSONL, gzipped or not); `uniroute models outcomes` writes one."
)

PRICES_HELP = "What the models cost (JSON), in USD per token under LiteLLM's field names."

LABELS_HELP = (
    "N, how many prompts each new model is asked, with commas; by default 25,50,100,200,400 as far as they go."
)

UNSEEN_HELP = """The share of the models that is new in a trial; the others are known by all their answers. 0: all are
new. By default a third, or 0 where that is only one model."""

DEPLOYED_HELP = """Instead of trials: the map, the profiles and the prices of a running server, on outcomes of models of
the same names."""


def evaluate(
    outcomes: Annotated[Path, typer.Option("--outcomes", metavar="FILE", help=OUTCOMES_HELP)],
    prices: Annotated[Path | None, typer.Option("--prices", metavar="FILE", help=PRICES_HELP)] = None,
    labels: Annotated[str | None, typer.Option("--labels", metavar="N,N…", help=LABELS_HELP)] = None,
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="Random splits; by default 200.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Same files, same seed: same figures.")] = 0,
    unseen: Annotated[float | None, typer.Option("--unseen", min=0.0, max=1.0, help=UNSEEN_HELP)] = None,
    embedder: Annotated[
        str | None,
        typer.Option("--embedder", help="static, transformer, or a model's name; by default the configured."),
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page with all figures.")] = None,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Write the curve as a picture.")] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Processes; by default one per CPU. The figures are the same."),
    ] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    url: UrlOption = None,
    *,
    deployed: Annotated[bool, typer.Option("--deployed", help=DEPLOYED_HELP)] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure routing on outcomes: quality against cost, beside other methods on the same prompts and answers.

    After the protocol of UniRoute's paper: in each trial 30 % of the prompts are test prompts, and the new models are
    seen through N answers to the others.
    """
    from proxy.cli.console import all_apart, readable, utf8_name, writable
    from proxy.cli.options import read_settings

    utf8_name(readable(outcomes, "--outcomes"), "--outcomes")
    all_apart({"--outcomes": outcomes, "--prices": prices, "--config": config, "--html": html, "--svg": svg})
    for path, where in ((html, "--html"), (svg, "--svg")):
        if path:
            writable(path, where)
    settings = read_settings(config, data_dir=data_dir)
    if deployed:
        stated = {"--prices": prices, "--labels": labels, "--trials": trials, "--seed": seed or None}
        _refuse_with_deployed({**stated, "--unseen": unseen, "--embedder": embedder, "--workers": workers})
        results = _deployed(outcomes, settings, url)
    else:
        order = Order(outcomes, prices, _numbers(labels), trials, seed, unseen)
        results = _studied(order, embedder or settings.embedder, settings.data_dir, workers)
    _show(results, html, svg, as_json=as_json)


@dataclass(frozen=True, slots=True)
class Order:
    """What was asked for; what is None is as usual for the file."""

    outcomes: Path
    prices: Path | None
    labels: tuple[int, ...] | None
    trials: int | None
    seed: int
    unseen: float | None


def _refuse_with_deployed(stated: dict[str, object]) -> None:
    from proxy.cli.console import BadArgument

    for option, value in stated.items():
        if value is not None:
            raise BadArgument(f"{option} is for trials; --deployed takes what is deployed, as it is")


def _numbers(text: str | None) -> tuple[int, ...] | None:
    from proxy.cli.console import BadArgument
    from router_core.documents import short_repr

    if text is None:
        return None
    try:
        numbers = sorted({int(number) for number in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise BadArgument(f"--labels: {short_repr(text)} is not whole numbers from 1 with commas, as 25,50,100")
    return tuple(numbers)


def _deployed(outcomes: Path, settings: Settings, url: str | None) -> Results:
    from proxy.cli import console

    results, common = deployed_results(outcomes, settings, url)
    for models, where in ((common.only_scored, "not deployed"), (common.only_deployed, f"not in {outcomes.name}")):
        if models:
            console.note(f"left out, {where}: {' '.join(', '.join(models).split())}")
    return results


def _studied(order: Order, embedder: str, data_dir: Path, workers: int | None) -> Results:
    from proxy.cli import console
    from proxy.cli.calibrate import embedded, user_turn
    from proxy.cli.console import known_embedder, opened_embedder, readable
    from router_core.evaluation.outcomes import read_outcomes
    from router_core.evaluation.study import run_study

    if order.prices is None:
        raise console.BadArgument("--prices: give the prices of the models that --outcomes scores")
    known_embedder(embedder, "--embedder")
    outcomes = read_outcomes(order.outcomes, readable(order.prices, "--prices"))
    opened = opened_embedder(embedder, data_dir)
    plan = _plan(order, outcomes, opened.id)
    plan.check(outcomes)
    with console.progress() as bars:
        vectors = embedded(map(user_turn, outcomes.prompts), opened, bars)
        return run_study(outcomes, vectors, plan, bars.update, workers=workers or os.cpu_count() or 1)


def _plan(order: Order, outcomes: Outcomes, embedder_id: str) -> Plan:
    from router_core.evaluation.trials import DEFAULT_TRIALS, Plan, default_labels, default_unseen

    return Plan(
        outcomes_name=order.outcomes.name,
        embedder_id=embedder_id,
        labels=default_labels(len(outcomes.prompts)) if order.labels is None else order.labels,
        trials=order.trials or DEFAULT_TRIALS,
        seed=order.seed,
        unseen=default_unseen(len(outcomes.models)) if order.unseen is None else order.unseen,
    )


def _show(results: Results, html: Path | None, svg: Path | None, *, as_json: bool) -> None:
    from proxy.cli import console
    from proxy.cli.report.html import write_page
    from proxy.cli.report.svg import write_svg
    from proxy.cli.report.text import document, tell

    try:
        for path, where, write in ((html, "--html", write_page), (svg, "--svg", write_svg)):
            if path:
                _write(results, path, where, write)
    finally:  # the files first, as `| head` ends what is told; and it is told whatever the disk says
        console.emit_json(document(results)) if as_json else tell(results)


def _write(results: Results, path: Path, where: str, write: Callable[[Results, Path], None]) -> None:
    from proxy.cli.console import CommandError, note

    try:
        write(results, path)
    except OSError as error:
        raise CommandError(f"{where}: {path} cannot be written ({error.strerror or error})") from None
    note(f"{path} is written")
