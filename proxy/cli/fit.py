"""`uniroute fit`: a cluster map from your own prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proxy.cli.options import DataDirOption, JsonOption


def fit(
    prompts: Annotated[list[Path], typer.Argument(help="Text (one prompt a line) or JSONL files; .gz too.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write the map to.")],
    clusters: Annotated[int, typer.Option("--clusters", min=2, max=4096, help="K, how many clusters.")] = 64,
    seed: Annotated[int, typer.Option("--seed", help="Same prompts, same seed: same map.")] = 0,
    embedder: Annotated[str, typer.Option("--embedder", help="static, transformer, or a model's name.")] = "static",
    data_dir: DataDirOption = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Fit a cluster map on unlabelled prompts. Profiles measured on another map do not carry over."""
    from proxy.cli import console
    from proxy.cli.inputs import empty_folder, opened_embedder
    from proxy.cli.options import read_settings
    from proxy.cli.prompt_files import read_prompts
    from router_core.artifact import save_map
    from router_core.fitting import fit_map

    settings = read_settings(None, data_dir=data_dir)
    texts = list(read_prompts(prompts))
    empty_folder(out, "--out")
    opened = opened_embedder(embedder, settings.data_dir)
    with console.progress() as bars:
        fitted = fit_map(texts, opened, clusters, seed=seed, progress=bars.update)
    save_map(fitted, out)
    if as_json:
        console.emit_json({"map": fitted.id, "clusters": fitted.size, "prompts": len(texts), "folder": str(out)})
        return
    console.say(f"{out}: map {fitted.id} with {fitted.size} clusters of {len(texts)} prompts")
    for number, name in enumerate(fitted.names):
        console.say(f"  {number:>3}  {name}")
    console.say(f"use it with `map: {out}` in the uniroute section, or UNIROUTE_MAP={out}")
