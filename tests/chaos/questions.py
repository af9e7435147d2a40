from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

Json = dict[str, Any]

_QUESTION_PATTERN = re.compile(r"\[(?P<id>[a-z0-9-]+): (?P<words>[0-9]+) words\]")
_ANSWERED = re.compile(r"\[(?P<id>[a-z0-9-]+) by (?P<model>[a-z]+)\]")
TOPICS = (
    "Write a Python function that merges two sorted lists.",
    "What is the capital of Burkina Faso, and since when?",
    "Solve for x: 3x + 7 = 25, and show the steps.",
    "Summarise the rules of cricket for a child.",
    "Translate into German: the meeting was moved to Friday.",
    "Which of these numbers is prime: 91, 97, 99?",
    "Explain the difference between a process and a thread.",
    "Write a SQL query that lists the ten best customers.",
)


@dataclass(frozen=True)
class ChaosModel:
    """Describe one model of the run. Prices are whole picodollars per token, so that every sum is exact."""

    name: str
    input_pico: int
    cached_pico: int
    output_pico: int

    @property
    def upstream(self) -> str:
        """Return its name at the upstream."""
        return f"{self.name}-upstream"

    @property
    def model_info(self) -> Json:
        return {
            "input_cost_per_token": self.input_pico / 1e12,
            "cache_read_input_token_cost": self.cached_pico / 1e12,
            "output_cost_per_token": self.output_pico / 1e12,
        }

    def spend_pico(self, usage: Mapping[str, Any] | None) -> int | None:
        """Return the cost in picodollars; None if nothing was reported."""
        if usage is None:
            return None
        cached: int = usage["prompt_tokens_details"]["cached_tokens"]
        fresh: int = usage["prompt_tokens"] - cached
        return fresh * self.input_pico + cached * self.cached_pico + int(usage["completion_tokens"]) * self.output_pico


# From cheap and poor to expensive and good.
MODELS: Mapping[str, ChaosModel] = {
    model.name: model
    for model in (
        ChaosModel("alder", 101_000, 10_100, 403_000),
        ChaosModel("birch", 307_000, 153_500, 1_201_000),
        ChaosModel("cedar", 1_009_000, 100_900, 4_013_000),
        ChaosModel("larch", 2_503_000, 1_251_500, 10_007_000),
    )
}


@dataclass(frozen=True)
class Question:
    id: str
    words: int

    @property
    def prompt(self) -> str:
        topic = TOPICS[_number(self.id, "topic") % len(TOPICS)]
        return f"{topic} [{self.id}: {self.words} words]"

    def answer(self, model: str) -> str:
        """Return an answer that names the question and the model, and has an end: a cut or mixed-up one is seen."""
        start = _number(self.id, model) % 1000
        words = " ".join(f"w{start + place}" for place in range(self.words))
        return f"[{self.id} by {model}] {words} [end of {self.id}]"

    def usage(self, model: str) -> Json:
        """Return the usage that the model reports; some of the prompt was cached."""
        prompt = 20 + _number(self.id, model, "prompt") % 400
        cached = _number(self.id, model, "cached") % prompt
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.words + 6,
            "total_tokens": prompt + self.words + 6,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def a_question(number: int, rng: Random, *, words: int | None = None) -> Question:
    return Question(f"q{number}-{rng.getrandbits(32):08x}", words or rng.choice((1, 8, 30, 120)))


def question_in(text: str) -> Question | None:
    """Return the question that a prompt asks."""
    found = _QUESTION_PATTERN.search(text)
    return Question(found["id"], int(found["words"])) if found else None


def answering_model(text: str) -> str | None:
    """Return the model that an answer names; None before the text has named it."""
    found = _ANSWERED.match(text)
    return found["model"] if found else None


def _number(*words: str) -> int:
    return int.from_bytes(hashlib.sha256("/".join(words).encode()).digest()[:6], "big")
