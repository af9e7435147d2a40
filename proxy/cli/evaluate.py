from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxy.cli import console
from proxy.cli.console import (
    BadArgument,
    CommandError,
    ConfigOption,
    DataDirOption,
    JsonOption,
    UrlOption,
    echo_err,
    load_embedder,
    progress,
    require_distinct,
    require_embedder,
    require_readable,
    require_utf8_name,
    require_writable,
)

if TYPE_CHECKING:
    from proxy.settings.schema import Settings
    from router_core.evaluation.outcomes import Outcomes
    from router_core.evaluation.study import Results
    from router_core.evaluation.trials import Plan


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
        typer.Option(
            "--embedder", help="static, multilingual, transformer, or a model's name; by default the configured."
        ),
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
    from proxy.cli.console import read_settings

    require_utf8_name(require_readable(outcomes, "--outcomes"), "--outcomes")
    require_distinct({"--outcomes": outcomes, "--prices": prices, "--config": config, "--html": html, "--svg": svg})
    for path, option, library in ((html, "--html", "plotly"), (svg, "--svg", "matplotlib")):
        if path:
            if find_spec(library) is None:
                raise BadArgument(f"{option} needs {library}; pip install 'uniroute[evaluate]'")
            require_writable(path, option)
    settings = read_settings(config, data_dir=data_dir)
    if deployed:
        given = {"--prices": prices, "--labels": labels, "--trials": trials, "--seed": seed or None}
        _reject_with_deployed({**given, "--unseen": unseen, "--embedder": embedder, "--workers": workers})
        results = _evaluate_deployment(outcomes, settings, url)
    else:
        study = StudyOptions(outcomes, prices, _parse_labels(labels), trials, seed, unseen)
        results = _run_study(study, embedder or settings.embedder, settings.data_dir, workers)
    _report(results, html, svg, as_json=as_json)


@dataclass(frozen=True, slots=True)
class StudyOptions:
    """What was asked for; None stands for the default, which depends on the file."""

    outcomes: Path
    prices: Path | None
    labels: tuple[int, ...] | None
    trials: int | None
    seed: int
    unseen: float | None


def _reject_with_deployed(given: dict[str, object]) -> None:
    for option, value in given.items():
        if value is not None:
            raise BadArgument(f"{option} is for trials; --deployed takes what is deployed, as it is")


def _parse_labels(text: str | None) -> tuple[int, ...] | None:
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


def _evaluate_deployment(outcomes: Path, settings: Settings, url: str | None) -> Results:
    from proxy.cli.deployed import evaluate_deployment

    results, common = evaluate_deployment(outcomes, settings, url)
    for models, where in ((common.only_scored, "not deployed"), (common.only_deployed, f"not in {outcomes.name}")):
        if models:
            console.echo_err(f"left out, {where}: {' '.join(', '.join(models).split())}")
    return results


def _run_study(study: StudyOptions, embedder_name: str, data_dir: Path, workers: int | None) -> Results:
    from proxy.cli.deployed import embed_conversations, user_turn
    from router_core.evaluation.outcomes import read_outcomes
    from router_core.evaluation.study import run_study

    if study.prices is None:
        raise BadArgument("--prices: give the prices of the models that --outcomes scores")
    require_embedder(embedder_name, "--embedder")
    outcomes = read_outcomes(study.outcomes, require_readable(study.prices, "--prices"))
    embedder = load_embedder(embedder_name, data_dir)
    plan = _plan(study, outcomes, embedder.id)
    plan.check(outcomes)
    with progress() as bars:
        vectors = embed_conversations(map(user_turn, outcomes.prompts), embedder, bars)
        return run_study(outcomes, vectors, plan, bars.update, workers=workers or os.cpu_count() or 1)


def _plan(study: StudyOptions, outcomes: Outcomes, embedder_id: str) -> Plan:
    from router_core.evaluation.trials import DEFAULT_TRIALS, Plan, default_labels, default_unseen

    return Plan(
        outcomes_name=study.outcomes.name,
        embedder_id=embedder_id,
        labels=default_labels(len(outcomes.prompts)) if study.labels is None else study.labels,
        trials=study.trials or DEFAULT_TRIALS,
        seed=study.seed,
        unseen=default_unseen(len(outcomes.models)) if study.unseen is None else study.unseen,
    )


def _report(results: Results, html: Path | None, svg: Path | None, *, as_json: bool) -> None:
    from proxy.cli.report.html import write_page
    from proxy.cli.report.svg import write_svg
    from proxy.cli.report.text import document

    try:
        for path, option, write in ((html, "--html", write_page), (svg, "--svg", write_svg)):
            if path:
                _write(results, path, option, write)
    finally:  # after the files, since `| head` ends the command here; and whatever happened to the files
        if as_json:
            console.emit_json(document(results))
        else:
            print_summary(results)


def print_summary(results: Results, labels: int | None = None) -> None:
    from proxy.cli.report.text import Table, summary

    for part in summary(results, labels):
        if isinstance(part, Table):
            console.table(part.columns, part.rows, title=part.title)
        else:
            console.echo(part)


def _write(results: Results, path: Path, option: str, write: Callable[[Results, Path], None]) -> None:
    try:
        write(results, path)
    except OSError as error:
        raise CommandError(f"{option}: {path} cannot be written ({error.strerror or error})") from None
    echo_err(f"{path} is written")
