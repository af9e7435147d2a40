"""Prompts as they would be sent, and as the proxy embeds them: of the validation set, or of files. Routes none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from proxy.cli.console import BadArgument
from proxy.cli.prompt_files import check_prompt_files, read_prompts
from proxy.cli.validation import open_set

if TYPE_CHECKING:
    from proxy.cli.console import Progress
    from proxy.settings.schema import Settings
    from router_core.types import Embedder, Floats

Messages = Sequence[Mapping[str, str]]

SAMPLED = 5_000
"""Prompts of files that are looked at, drawn by chance with a fixed seed."""


@dataclass(frozen=True)
class Traffic:
    """The messages of each prompt."""

    name: str
    prompts: Sequence[Messages]


def opened_traffic(settings: Settings, paths: Sequence[Path]) -> Traffic:
    """The validation set of the settings, or a sample of files. Raises BadArgument, InvalidValidationSet."""
    if not paths:
        asked = open_set(settings.validation_set)
        return Traffic("the validation set", [prompt.messages for prompt in asked])
    check_prompt_files(paths)
    texts = sample(text for text in read_prompts(paths) if text.strip())
    if not texts:
        raise BadArgument(f"--prompts: there is no prompt in {', '.join(map(str, paths))}")
    return Traffic(", ".join(path.name for path in paths), [user_turn(text) for text in texts])


def user_turn(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def embedded(prompts: Iterable[Messages], embedder: Embedder, bars: Progress) -> Floats:
    """(n, d) of n prompts, by the text that a server would look at."""
    from proxy.routing.requirements import routing_text
    from router_core.fitting import embed_prompts

    return embed_prompts([routing_text(messages) for messages in prompts], embedder, bars.update)


def sample(texts: Iterable[str], size: int = SAMPLED) -> list[str]:
    """At most so many, each as likely (reservoir sampling): a prompt that comes often counts as often."""
    rng, kept = np.random.default_rng(0), list[str]()
    for number, text in enumerate(texts):
        if number < size:
            kept.append(text)
        elif (place := int(rng.integers(number + 1))) < size:
            kept[place] = text
    return kept
