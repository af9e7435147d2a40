from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from router_core.errors import InvalidValidationSet
from router_core.types import Assignment, Doubles, Indices
from router_core.validation.graders import Grader

Message = Mapping[str, Any]


@dataclass(frozen=True)
class ValidationPrompt:
    """What is sent to a model, and how its answer is graded."""

    id: str
    family: str
    messages: tuple[Message, ...]
    """In OpenAI's form. The content of a turn with tool calls may be None; that of the user is a text."""
    grader: Grader
    max_tokens: int
    level: int | None = None
    """1 easy, 2 medium, 3 hard; None if not stated."""
    language: str = "en"
    reference: str | None = field(default=None, repr=False)
    """An answer with full marks, tool calls in the form of `write_reply`. Never sent to a model."""
    tools: tuple[Mapping[str, object], ...] = ()
    """What the model may call, in OpenAI's form. Models that are known to call no tools are not asked such prompts."""
    tool_choice: str | Mapping[str, object] | None = None

    @property
    def request(self) -> dict[str, object]:
        """Return the members of a chat request that the prompt fixes."""
        return {"messages": [dict(message) for message in self.messages], **self._tool_fields()}

    def _tool_fields(self) -> dict[str, object]:
        fields = {"tools": [dict(tool) for tool in self.tools] or None, "tool_choice": self.tool_choice}
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def text(self) -> str:
        """What the user says, which is the text that is embedded."""
        return "\n".join(message["content"] for message in self.messages if message["role"] == "user")

    def to_json(self) -> dict[str, object]:
        """Write one line of the JSONL file; a single user message is written as `prompt`."""
        single = len(self.messages) == 1 and self.messages[0]["role"] == "user"
        content: dict[str, object] = {"prompt": self.text} if single else {"messages": [dict(m) for m in self.messages]}
        record = {"id": self.id, "family": self.family, **content, "grader": self.grader.to_json()}
        record |= {"max_tokens": self.max_tokens, "level": self.level, "language": self.language}
        record |= {"reference": self.reference, **self._tool_fields()}
        return {key: value for key, value in record.items() if value is not None}


@dataclass(frozen=True)
class ValidationSet:
    """Prompts in order. Two sets with the same `id` ask and grade the same."""

    prompts: tuple[ValidationPrompt, ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for prompt in self.prompts:
            if prompt.id in seen:
                raise InvalidValidationSet(f"the id {prompt.id!r} occurs twice: give each prompt its own id")
            seen.add(prompt.id)

    @classmethod
    def from_prompts(cls, prompts: Iterable[ValidationPrompt]) -> ValidationSet:
        return cls(tuple(prompts))

    @cached_property
    def id(self) -> str:
        """SHA-256 over every line's canonical JSON, cut to 16 hex digits."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(json.dumps(prompt.to_json(), sort_keys=True, ensure_ascii=False).encode() + b"\n")
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[ValidationPrompt]:
        return iter(self.prompts)

    @property
    def families(self) -> tuple[str, ...]:
        """The family of each prompt, in order, as `choose_prompts` takes them."""
        return tuple(prompt.family for prompt in self.prompts)


# Below this weight the prior of the shrunk estimator (weight ½) makes up more than a fifth of the estimate.
THIN_LABELS = 2.0


def coverage(assignment: Assignment, clusters: int) -> Doubles:
    """Return the (K,) label weight per cluster, Σ_j w_jk, which sums to the number of prompts."""
    labels: Doubles = assignment.dense(clusters).sum(axis=0)
    return labels


def thin_clusters(labels: Doubles, *, below: float = THIN_LABELS) -> tuple[int, ...]:
    """Return the clusters with less label weight than `below`, thinnest first."""
    order = np.argsort(labels, kind="stable")
    return tuple(int(cluster) for cluster in order if labels[cluster] < below)


# Random prompts of a family that the next is chosen from. To choose from the whole family would cover clusters best,
# and pick its oddest prompts.
CANDIDATES = 3

# Label weight that each cluster counts as having at first.
PRIOR_WEIGHT = 0.5


def choose_prompts(assignment: Assignment, count: int, *, families: Sequence[str], seed: int = 0) -> Indices:
    """Choose prompts to ask a new model: (min(count, n),) rows, in the order to ask them.

    A smaller choice is the beginning of a larger one. Each place goes to the family that is furthest behind its share.
    Of a few of its prompts, drawn at random, that one is chosen which adds most to Σ_k log(½ + W_k), where W_k is the
    label weight of cluster k so far. They are drawn at random because prompts at the centre of a cluster are not
    typical.

    A family's share is proportional to the square root of its size: how many prompts of a kind a set has says little
    about traffic, and small families must be measured too.
    """
    if len(families) != len(assignment):
        raise ValueError(f"{len(assignment)} prompts but {len(families)} families")
    rng = np.random.default_rng(seed)
    weights = assignment.dense(int(assignment.ids.max(initial=-1)) + 1)
    left = _rows_by_family(families)
    shares = np.sqrt([len(rows) for rows in left])
    asked = rng.random(len(left))  # which family begins is random too
    covered = np.full(weights.shape[1], PRIOR_WEIGHT)
    chosen = np.empty(min(count, len(families)), dtype=np.int64)
    for place in range(chosen.size):
        family = int(np.argmin(np.where([bool(rows) for rows in left], asked / shares, np.inf)))
        drawn = rng.permutation(left[family])[:CANDIDATES]
        row = int(drawn[_most_covering(weights[drawn], covered)])
        left[family].remove(row)
        chosen[place] = row
        asked[family] += 1
        covered += weights[row]
    return chosen


def _rows_by_family(families: Sequence[str]) -> list[list[int]]:
    family_of = np.asarray(families, dtype=str)
    return [np.flatnonzero(family_of == family).tolist() for family in np.unique(family_of)]


def _most_covering(weights: Doubles, covered: Doubles) -> int:
    """Return which of the (d, K) rows adds most to the (K,) label weights so far."""
    return int(np.argmax(np.log1p(weights / covered).sum(axis=1)))
