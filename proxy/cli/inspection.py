"""Commands that show and change nothing: `route`, the choice for one prompt; `validation`, the prompts and graders."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from proxy.cli import console
from proxy.cli.console import (
    BadArgument,
    DataDirOption,
    JsonOption,
    UrlOption,
    finite,
    read_settings,
    read_validation_set,
)

LambdaOption = Annotated[
    float | None, typer.Option("--lambda", min=0.0, callback=finite, help="Cost weight of this request.")
]


def route(
    prompt: Annotated[str, typer.Argument(help="The user's text.")],
    cost_weight: LambdaOption = None,
    model: Annotated[str, typer.Option("--model", help="auto, uniroute/best or uniroute/cheap.")] = "auto",
    url: UrlOption = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Ask a running server which model it would choose."""
    from proxy.cli.client import caller_client

    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": prompt}]}
    if cost_weight is not None:
        body["uniroute"] = {"lambda": cost_weight}
    with caller_client(url) as server:
        decision = server.call("POST", "/v1/route", body)
    if as_json:
        console.emit_json(decision)
    else:
        show_decision(decision)


def show_decision(decision: Mapping[str, Any]) -> None:
    """Print the choice, the prompt's clusters, the candidates with their figures, and the ineligible models."""
    console.echo(f"{decision['model']}  ({decision['reason']}, λ = {decision['lambda']:g})")
    near = [f"{c['name']} {c['weight']:.0%}" for c in decision["clusters"][:3]]
    if near:
        console.echo(f"  prompt is near: {'; '.join(near)}")
    rows = [candidate_row(candidate) for candidate in decision["candidates"]]
    if rows:
        console.table(("model", "expected error", "expected cost", "score", "chosen at λ"), rows)
    for ruled_out in decision["ineligible"]:
        console.echo(f"  {ruled_out['model']}: not eligible, {ruled_out['why']}")


def candidate_row(candidate: Mapping[str, Any]) -> tuple[str, ...]:
    flips = candidate["flips_at_lambda"]
    return (
        candidate["model"],
        f"{candidate['expected_error']:.2f} [{candidate['error_low']:.2f}, {candidate['error_high']:.2f}]",
        f"${candidate['expected_cost_usd']:.6f}",
        f"{candidate['score']:.3f}",
        "never" if flips is None else f"{flips:.3g}",
    )


validation = typer.Typer(
    no_args_is_help=True, help="Inspect the validation set: the prompts that models are measured on."
)

SetArgument = Annotated[str, typer.Argument(metavar="[FILE]", help="A JSONL file; the built-in set if left out.")]


@validation.command("list")
def list_families(source: SetArgument = "builtin", *, as_json: JsonOption = False) -> None:
    """List the families of the set, with the number of prompts and how they are graded."""
    chosen = read_validation_set(source)
    prompts = Counter(prompt.family for prompt in chosen)
    graders = {family: ", ".join(sorted({p.grader.type for p in chosen if p.family == family})) for family in prompts}
    if as_json:
        families = [{"family": family, "prompts": n, "grader": graders[family]} for family, n in prompts.items()]
        console.emit_json({"id": chosen.id, "prompts": len(chosen), "families": families})
        return
    console.echo(f"{len(chosen)} prompts in {len(prompts)} families (set {chosen.id})")
    console.table(("family", "prompts", "grader"), [(f, n, graders[f]) for f, n in sorted(prompts.items())])


@validation.command()
def export(
    source: SetArgument = "builtin",
    out: Annotated[Path | None, typer.Option("--out", help="Write here instead of stdout.")] = None,
) -> None:
    """Write the set as JSONL, one prompt a line, as a start for your own."""
    lines = [json.dumps(prompt.to_json(), ensure_ascii=False) for prompt in read_validation_set(source)]
    if out is None:
        console.echo("\n".join(lines))
        return
    try:
        out.write_text("\n".join(lines) + "\n", "utf-8")
    except OSError as error:
        raise BadArgument(f"--out: {out} cannot be written ({error.strerror})") from None
    console.echo_err(f"{out}: {len(lines)} prompts")


@validation.command()
def check(source: SetArgument = "builtin", data_dir: DataDirOption = None, *, as_json: JsonOption = False) -> None:
    """Check a set: report its first broken line, or the clusters of the map with few labels."""
    from proxy.server.startup import load_cluster_map
    from router_core.validation.validation_set import coverage, thin_clusters

    chosen = read_validation_set(source)
    settings = read_settings(None, data_dir=data_dir)
    cluster_map = load_cluster_map(settings)
    embedder = console.load_embedder(settings.embedder, settings.data_dir)
    labels = coverage(cluster_map.assign(embedder.embed([prompt.text for prompt in chosen])), cluster_map.size)
    thin = [(k, cluster_map.names[k], float(labels[k])) for k in thin_clusters(labels)]
    if as_json:
        rows = [{"cluster": k, "name": name, "label_weight": round(weight, 3)} for k, name, weight in thin]
        console.emit_json({"id": chosen.id, "prompts": len(chosen), "clusters": cluster_map.size, "thin": rows})
        return
    console.echo(f"{len(chosen)} prompts, every line is good")
    console.echo(f"{cluster_map.size - len(thin)} of {cluster_map.size} clusters have label weight 2 or more")
    if thin:
        console.table(("thin cluster", "name", "label weight"), [(k, n, f"{weight:.2f}") for k, n, weight in thin])
