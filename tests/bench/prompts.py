from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

from router_core.validation.families.registry import builtin_validation_set

# Words of a prompt.
SHORTEST, LONGEST = 8, 60


def generated_prompts(count: int, seed: int = 0) -> Iterator[str]:
    """Generate nearly distinct prompts: each ends with a number below `count`."""
    rng = Random(seed)
    families: dict[str, list[str]] = {}
    for prompt in builtin_validation_set():
        families.setdefault(prompt.family, []).extend(prompt.text.split())
    words = list(families.values())
    for _ in range(count):
        drawn = rng.choices(rng.choice(words), k=rng.randint(SHORTEST, LONGEST))
        yield f"{' '.join(drawn)} {rng.randrange(count)}"


def write_prompts(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for prompt in generated_prompts(count):
            file.write(json.dumps({"prompt": prompt}) + "\n")
