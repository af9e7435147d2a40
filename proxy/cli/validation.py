"""`uniroute validation`: what models are asked when they are measured; checking a set of your own."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxy.cli.options import DataDirOption, JsonOption, read_settings

if TYPE_CHECKING:
    from router_core.validation.prompts import ValidationSet

validation = typer.Typer(no_args_is_help=True, help="The validation set: prompts that models are measured on.")
SetArgument = Annotated[str, typer.Argument(metavar="[FILE]", help="A JSONL file; the built-in set if left out.")]


@validation.command("list")
def list_families(source: SetArgument = "builtin", *, as_json: JsonOption = False) -> None:
    """Families of the set, with the number of prompts and how they are graded."""
    from proxy.cli import console

    chosen = open_set(source)
    prompts = Counter(prompt.family for prompt in chosen)
    graders = {family: ", ".join(sorted({p.grader.type for p in chosen if p.family == family})) for family in prompts}
    if as_json:
        families = [{"family": family, "prompts": n, "grader": graders[family]} for family, n in prompts.items()]
        console.emit_json({"id": chosen.id, "prompts": len(chosen), "families": families})
        return
    console.say(f"{len(chosen)} prompts in {len(prompts)} families (set {chosen.id})")
    console.table(("family", "prompts", "grader"), [(f, n, graders[f]) for f, n in sorted(prompts.items())])


@validation.command()
def export(
    source: SetArgument = "builtin",
    out: Annotated[Path | None, typer.Option("--out", help="Write here instead of stdout.")] = None,
) -> None:
    """Write the set as JSONL, one prompt a line: a start for your own."""
    from proxy.cli import console

    lines = [json.dumps(prompt.to_json(), ensure_ascii=False) for prompt in open_set(source)]
    if out is None:
        console.say("\n".join(lines))
        return
    try:
        out.write_text("\n".join(lines) + "\n", "utf-8")
    except OSError as error:
        raise console.BadArgument(f"--out: {out} cannot be written ({error.strerror})") from None
    console.note(f"{out}: {len(lines)} prompts")


@validation.command()
def check(source: SetArgument = "builtin", data_dir: DataDirOption = None, *, as_json: JsonOption = False) -> None:
    """Read a set, report the first broken line, and say which clusters of the map it leaves thin."""
    from proxy.app import open_map
    from proxy.cli import console
    from proxy.cli.inputs import opened_embedder
    from router_core.validation.coverage import coverage, thin_clusters

    chosen = open_set(source)
    settings = read_settings(None, data_dir=data_dir)
    cluster_map = open_map(settings)
    embedder = opened_embedder(settings.embedder, settings.data_dir)
    labels = coverage(cluster_map.assign(embedder.embed([prompt.text for prompt in chosen])), cluster_map.size)
    thin = [(k, cluster_map.names[k], float(labels[k])) for k in thin_clusters(labels)]
    if as_json:
        rows = [{"cluster": k, "name": name, "label_weight": round(weight, 3)} for k, name, weight in thin]
        console.emit_json({"id": chosen.id, "prompts": len(chosen), "clusters": cluster_map.size, "thin": rows})
        return
    console.say(f"{len(chosen)} prompts, every line is good")
    console.say(f"{cluster_map.size - len(thin)} of {cluster_map.size} clusters have label weight 2 or more")
    if thin:
        console.table(("thin cluster", "name", "label weight"), [(k, n, f"{weight:.2f}") for k, n, weight in thin])


def open_set(source: str) -> ValidationSet:
    """`builtin` or a JSONL path. Raises BadArgument, and InvalidValidationSet naming the line."""
    from proxy.cli.inputs import readable
    from router_core.validation.builtin import builtin_validation_set
    from router_core.validation.loading import load_validation_set

    return builtin_validation_set() if source == "builtin" else load_validation_set(readable(Path(source), "FILE"))
