"""Print what the built-in map knows of the prompts that it was fitted to: `python -m tests.bench.map_figures FOLDER`.

The folder has the two public outcome files, llmrouter9.jsonl.gz and routellm2.jsonl.gz. The map was fitted to all
prompts of the first, to 1,500 of the second, of which it is not known which, and to the validation families of the
seeds 1 to 4. Their shares are those that follow from the overlap of the map's own clusters; for comparison, the prompts
are assigned again, with 1,500 of the second file drawn anew each time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from router_core.artifact import builtin_map
from router_core.clustering import NOVEL_SHARE, FittedPrompts
from router_core.embedding import static_embedder
from router_core.evaluation.outcomes import parse_row, read_rows
from router_core.text import truncate_middle
from router_core.validation.families.registry import builtin_validation_set
from tests.conftest import CACHE

DRAWS, DRAWN, SEEDS = 5, 1500, (1, 2, 3, 4)


def lines(folder: Path) -> Iterator[str]:
    cluster_map, embedder = builtin_map(), static_embedder(CACHE)
    shares = cluster_map.prompt_shares
    assert shares is not None
    whole, sampled = (prompts_of(folder / name) for name in ("llmrouter9.jsonl.gz", "routellm2.jsonl.gz"))
    families = [prompt.text for seed in SEEDS for prompt in builtin_validation_set(seed)]
    rng = np.random.default_rng(0)
    yield f"shares of the map: {shares.min():.4f} to {shares.max():.4f}, {len(shares)} clusters"
    for _ in range(DRAWS):
        drawn = [sampled[row] for row in rng.choice(len(sampled), DRAWN, replace=False)]
        texts = list(dict.fromkeys((*whole, *drawn, *families)))
        found = FittedPrompts.of(cluster_map.assign(embedder.embed(texts)), cluster_map.size)
        distance = 0.5 * float(np.abs(found.shares - shares).sum())
        yield (
            f"{found.count} distinct prompts: {distance:.4f} of them in other clusters;"
            f" {1 - NOVEL_SHARE:.0%} have a cosine of {found.novel_below:.4f} or more"
        )


def prompts_of(path: Path) -> list[str]:
    return list(dict.fromkeys(truncate_middle(parse_row(where, line).prompt) for where, line in read_rows(path)))


if __name__ == "__main__":
    for line in lines(Path(sys.argv[1])):
        print(line)  # noqa: T201
