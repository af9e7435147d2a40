"""Print how alike the maps take one question in many languages: `python -m tests.bench.language_agreement`.

The questions are the sums of the family `other_languages`, with the same numbers in each language. Agreement is the
share of a prompt's clusters that its English form has too, Σ_k min(w_k, w'_k): 1 where the two are routed alike. For
comparison, that of English questions of different kinds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from random import Random

import numpy as np

from router_core.artifact import builtin_map
from router_core.clustering import assign_texts
from router_core.embedding import STATIC_KINDS, static_embedder
from router_core.types import Doubles
from router_core.validation.families.languages import MORE_TONGUES, TONGUES
from tests.conftest import CACHE

ENGLISH = (
    "What is {a} plus {b}?",
    "A notebook costs {b} euros. How much do {a} notebooks cost? Answer with the number only.",
    "A train runs at {a} km/h for {b} hours and then goes another {c} kilometres. How many kilometres is that in all?",
)

DRAWS = 40


def texts_of(sums: tuple[str, str, str]) -> list[str]:
    """Return DRAWS prompts of each template, with the same numbers for each language."""
    rng = Random(0)
    numbers = [{"a": rng.randint(21, 97), "b": rng.randint(3, 9), "c": rng.randint(11, 98)} for _ in range(DRAWS)]
    return [template.format(**drawn) for template in sums for drawn in numbers]


def agreement(left: Doubles, right: Doubles) -> float:
    return float(np.minimum(left, right).sum(axis=1).mean())


def of_embedder(name: str) -> Mapping[str, float]:
    embedder, cluster_map = static_embedder(CACHE, name=name), builtin_map(name)

    def weights(sums: tuple[str, str, str]) -> Doubles:
        return assign_texts(texts_of(sums), embedder, cluster_map).dense(cluster_map.size)

    english = weights(ENGLISH)
    kinds = np.split(english, 3)
    found = {"en, other kinds": float(np.mean([agreement(one, other) for one, other in combinations(kinds, 2)]))}
    return found | {
        language: agreement(english, weights(t.sums)) for language, t in {**TONGUES, **MORE_TONGUES}.items()
    }


def lines() -> Iterator[str]:
    by_embedder = {name: of_embedder(name) for name in STATIC_KINDS}
    yield "language         " + "  ".join(by_embedder)
    for language in by_embedder["static"]:
        yield f"{language:16} " + "  ".join(f"{found[language]:{len(name)}.2f}" for name, found in by_embedder.items())


if __name__ == "__main__":
    for line in lines():
        print(line)  # noqa: T201
