"""Fit the built-in map of the multilingual embedder: `python -m tests.bench.multilingual_map FOLDER OUT`.

The folder has the two public outcome files, llmrouter9.jsonl.gz and routellm2.jsonl.gz: all prompts of the first and
1,500 of the second are read, as for the English map, and the validation families of the seeds 1 to 4. Other languages
than English are few in those, so that the families have their prompts of these of further seeds too.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from router_core.artifact import save_map
from router_core.embedding import static_embedder
from router_core.fitting import EmbeddedPrompts, fit_embedded
from router_core.validation.families.registry import FITTING_SECTIONS, generate
from tests.bench.map_figures import DRAWN, SEEDS, prompts_of
from tests.conftest import CACHE

CLUSTERS, LANGUAGE_SEEDS = 64, range(1, 21)


def fit(folder: Path, out: Path) -> Iterator[str]:
    whole, sampled = (prompts_of(folder / name) for name in ("llmrouter9.jsonl.gz", "routellm2.jsonl.gz"))
    drawn = [sampled[row] for row in np.random.default_rng(0).choice(len(sampled), DRAWN, replace=False)]
    families = [
        prompt
        for seed in LANGUAGE_SEEDS
        for prompt in generate(FITTING_SECTIONS, seed)
        if seed in SEEDS or prompt.language != "en"
    ]
    texts = list(dict.fromkeys((*whole, *drawn, *(prompt.text for prompt in families))))
    embedder = static_embedder(CACHE, name="multilingual")
    fitted = fit_embedded(EmbeddedPrompts(texts, embedder.embed(texts), embedder.id), CLUSTERS)
    save_map(fitted, out)
    spread = Counter({prompt.text: prompt.language for prompt in families}.values())
    yield f"{len(texts)} distinct prompts, of the families {dict(spread.most_common())}"
    yield f"map {fitted.id}: {'; '.join(fitted.names)}"


if __name__ == "__main__":
    for line in fit(Path(sys.argv[1]), Path(sys.argv[2])):
        print(line)  # noqa: T201
