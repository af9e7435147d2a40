"""One validation prompt with its grader, and a set of them with a digest. Where they come from: builtin and loading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from router_core.errors import InvalidValidationSet
from router_core.validation.graders import Grader


@dataclass(frozen=True)
class ValidationPrompt:
    """What is sent to a model, and how its answer is judged."""

    id: str
    family: str
    messages: tuple[Mapping[str, str], ...]
    grader: Grader
    max_tokens: int
    level: int | None = None
    """1 easy, 2 middling, 3 hard; None where the author does not say."""
    language: str = "en"
    reference: str | None = field(default=None, repr=False)
    """An answer that the grader accepts in full. Never sent to a model."""

    @property
    def text(self) -> str:
        """What the user says: the text that is embedded."""
        return "\n".join(message["content"] for message in self.messages if message["role"] == "user")

    def to_json(self) -> dict[str, object]:
        """One line of the JSONL file; a single user message is written as `prompt`."""
        lone = len(self.messages) == 1 and self.messages[0]["role"] == "user"
        said: dict[str, object] = {"prompt": self.text} if lone else {"messages": [dict(m) for m in self.messages]}
        record = {"id": self.id, "family": self.family, **said, "grader": self.grader.to_json()}
        record |= {"max_tokens": self.max_tokens, "level": self.level, "language": self.language}
        record |= {"reference": self.reference}
        return {key: value for key, value in record.items() if value is not None}


@dataclass(frozen=True)
class ValidationSet:
    """The prompts in order. Two sets with the same `id` ask and grade the same."""

    prompts: tuple[ValidationPrompt, ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for prompt in self.prompts:
            if prompt.id in seen:
                raise InvalidValidationSet(f"the id {prompt.id!r} occurs twice: give each prompt its own id")
            seen.add(prompt.id)

    @classmethod
    def of(cls, prompts: Iterable[ValidationPrompt]) -> ValidationSet:
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
        """The family of each prompt, in order: what `choose_prompts` asks for."""
        return tuple(prompt.family for prompt in self.prompts)
