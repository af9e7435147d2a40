from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxy.cli import console
from proxy.cli.console import BadArgument, DataDirOption, JsonOption, progress, require_embedder, require_empty_folder

if TYPE_CHECKING:
    from proxy.cli.console import Progress
    from proxy.cli.fit_backend import FitBackend, FitPlan
    from router_core.clustering import ClusterMap
    from router_core.fitting import PromptSample
    from router_core.types import Indices


PROMPTS_HELP = 'Text (one prompt a line), JSONL (.gz too) or Parquet files; rows have a "prompt" or "messages".'

OUTCOMES_HELP = """Scored prompts (JSONL), read with the others: the map remembers how hard its clusters are and how the
scored models differ. Of three models or more, each scored on 100 prompts, it has clusters of prompts that they find
alike. A new model then needs fewer answers."""

RAY_HELP = """Read and embed on Ray: `local` starts one on this machine, else the address of yours. The map is the same.
Each file is read by one worker, and must have the same path on every machine. Needs pip install 'uniroute[ray]'."""


def fit(
    out: Annotated[Path, typer.Option("--out", help="Folder to write the map to.")],
    prompts: Annotated[list[Path] | None, typer.Argument(help=PROMPTS_HELP)] = None,
    outcomes: Annotated[Path | None, typer.Option("--outcomes", help=OUTCOMES_HELP)] = None,
    clusters: Annotated[int, typer.Option("--clusters", min=2, max=4096, help="K, how many clusters.")] = 64,
    seed: Annotated[int, typer.Option("--seed", help="Same prompts, same seed: same map.")] = 0,
    embedder: Annotated[
        str, typer.Option("--embedder", help="static, multilingual, transformer, a model's folder or name.")
    ] = "static",
    data_dir: DataDirOption = None,
    ray: Annotated[str | None, typer.Option("--ray", metavar="ADDRESS", help=RAY_HELP)] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="With --ray: embedders at once; by default one per CPU.")
    ] = None,
    *,
    count: Annotated[
        bool, typer.Option("--count", help="Then assign every prompt, and say how many each cluster has.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Fit a cluster map on unlabelled prompts. Models are measured on it anew: by their recorded answers, if any.

    Any number of prompts: they are streamed, and K-means sees a sample of the distinct ones, drawn by --seed: 256 for
    each cluster, and at least 16,384.
    """
    from proxy.cli.console import check_prompt_files, read_settings
    from proxy.cli.fit_backend import FitPlan, outcome_models
    from router_core.artifact import save_map
    from router_core.fitting import distinct_prompts, fit_with_outcomes

    paths = [*(prompts or ()), *([outcomes] if outcomes else ())]
    if not paths:
        raise BadArgument("there is nothing to fit to: give files of prompts, or --outcomes")
    if workers and not ray:
        raise BadArgument("--workers is for --ray; one process embeds without it")
    settings = read_settings(None, data_dir=data_dir)
    if not ray:
        require_embedder(embedder, "--embedder")
    check_prompt_files(paths)
    require_empty_folder(out, "--out")
    plan = FitPlan(paths, clusters, seed, embedder, settings.data_dir)
    with progress() as bars, _backend(plan, bars, ray, workers) as backend:
        sample = backend.sample()
        embedded = backend.embed(distinct_prompts(sample, clusters))
        known = outcome_models(outcomes, embedded.texts)
        fitted = fit_with_outcomes(embedded, known.scores, known.models, clusters, seed=seed, progress=bars.update)
        save_map(fitted, out)
        counts = backend.count(fitted) if count else None
    if as_json:
        _print_json(fitted, sample, counts, out)
    else:
        _print(fitted, sample, counts, out)


@contextmanager
def _backend(plan: FitPlan, bars: Progress, ray: str | None, workers: int | None) -> Iterator[FitBackend]:
    from proxy.cli.fit_backend import LocalBackend, ray_backend

    if ray is None:
        yield LocalBackend(plan, bars)
        return
    with ray_backend(plan, bars, ray, workers) as backend:
        yield backend


def _print(fitted: ClusterMap, sample: PromptSample, counts: Indices | None, out: Path) -> None:
    console.echo(
        f"{out}: map {fitted.id} with {fitted.size} clusters of {len(sample):,} distinct prompts, {sample.read:,} read"
    )
    if fitted.reference_models and (known := fitted.reference_models.models):
        alike = f", and gave it {fitted.size - len(fitted.centroids)} of the clusters"
        if not fitted.learned_clusters:
            alike = ""
        console.echo(f"it remembers {len(known)} models{alike}: {', '.join(known)}")
    for number, name in enumerate(fitted.names):
        counted = "" if counts is None else f"{counts[number]:>10,}  " if number < counts.size else " " * 12
        console.echo(f"  {number:>3}  {counted}{name}")
    console.echo(f"use it with `map: {out}` in the uniroute section, or UNIROUTE_MAP={out}")


def _print_json(fitted: ClusterMap, sample: PromptSample, counts: Indices | None, out: Path) -> None:
    document: dict[str, object] = {
        "map": fitted.id,
        "clusters": fitted.size,
        "taught_clusters": fitted.size - len(fitted.centroids),
        "known_models": list(fitted.reference_models.models) if fitted.reference_models else [],
        "prompts": sample.read,
        "sampled": len(sample),
    }
    counted = {} if counts is None else {"counts": counts.tolist()}
    console.emit_json(document | counted | {"folder": str(out)})
