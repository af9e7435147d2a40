"""Names of clusters: the words that set their prompts apart. Knows no vectors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from router_core.types import Indices

NAME_WORDS = 3
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]{2}|[^\W\d_]{3,}")
"""Words, and pairs of the characters of scripts that put no spaces between words."""
FUNCTION_WORDS = frozenset(
    """about above after again all also and any are because been before being below between both but can could did does
    doing down during each few for from further had has have having her here hers him his how into its itself just more
    most not now off once only other our out over own same she should some such than that the their them then there
    these they this those through too under until very was were what when where which while who whom why will with
    would you your yours following answer come question""".split()  # noqa: SIM905
)
"""English words that name nothing, however distinctive."""


def cluster_names(prompts: Sequence[str], nearest: Indices, clusters: int) -> list[str]:
    """Per cluster, the words whose share of its prompts most exceeds that elsewhere (frequency times log-odds)."""
    inside = [Counter[str]() for _ in range(clusters)]
    for prompt, cluster in zip(prompts, nearest, strict=True):
        inside[cluster].update(set(WORD.findall(prompt.lower())) - FUNCTION_WORDS)
    sizes = np.bincount(nearest, minlength=clusters)
    everywhere = Counter[str]()
    for words in inside:
        everywhere.update(words)
    return [_name(words, int(sizes[k]), everywhere, len(prompts)) or f"cluster {k}" for k, words in enumerate(inside)]


def _name(words: Counter[str], size: int, everywhere: Counter[str], total: int) -> str:
    def distinctiveness(word: str) -> float:
        here = words[word] / max(size, 1)
        elsewhere = (everywhere[word] - words[word] + 1) / (total - size + 1)
        return float(here * np.log(here / elsewhere))

    return ", ".join(sorted(words, key=lambda word: (-distinctiveness(word), word))[:NAME_WORDS])
