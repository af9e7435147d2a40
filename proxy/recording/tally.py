"""What a batch of usage records adds up to, per model and per client key, in whole numbers. No Redis, no clock."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

TOTALS: Final = "uniroute:usage:totals"
"""With `:<model>`, the hash of what a model used."""
KEY_TOTALS: Final = "uniroute:usage:key"
"""With `:<id>`, the hash of what a client key used."""
COUNTED = ("prompt_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")
COUNTED_SINCE = ("cache_write_tokens", "audio_input_tokens", "audio_output_tokens")
"""Not in records that an earlier version wrote."""
DAY_S = 86_400
LARGEST = 10**18
"""A sum in Redis has 63 bits. What a single request cannot have used is taken as unknown, not as the end of the sum."""

Word = str | int | float


@dataclass
class Tally:
    """Of one batch."""

    texts: list[str] = field(default_factory=list)
    sums: defaultdict[tuple[str, str], int | float] = field(default_factory=lambda: defaultdict(int))
    """Hash and field → how much more."""
    settlements: list[list[str]] = field(default_factory=list)
    """Key, reservation, tokens, picodollars, day and month (UTC) of each record of a client key, as texts."""

    def add(self, text: str, record: Mapping[str, Any]) -> None:
        """Raises ValueError: it is not a record that we wrote, and nothing was added."""
        try:
            amounts = _amounts(record)
            model, key_id, reservation = record["model"], record["key_id"], record["reservation"] or ""
            day = _day(int(record["at"] // DAY_S))
        except (KeyError, TypeError, OverflowError, OSError) as error:
            raise ValueError(f"not a usage record: {type(error).__name__} {error}") from error
        self.texts.append(text)
        self._count(f"{TOTALS}:{model}", amounts)
        if key_id:
            self._count(f"{KEY_TOTALS}:{key_id}", amounts)
            cost = str(amounts.get("cost_picousd", ""))
            self.settlements.append([str(key_id), str(reservation), _tokens(record), cost, day, day[:7]])

    def words(self) -> list[Word]:
        """As the script reads it."""
        words: list[Word] = [len(self.texts), *self.texts, len(self.sums)]
        for (key, name), amount in self.sums.items():
            words += [key, name, repr(amount)]
        return [*words, *(word for settlement in self.settlements for word in settlement)]

    def _count(self, key: str, amounts: Mapping[str, int | float]) -> None:
        for name, amount in amounts.items():
            self.sums[key, name] += amount


@lru_cache(maxsize=8)
def _day(number: int) -> str:
    """UTC, of the day that is so many after the first of Unix time."""
    return datetime.fromtimestamp(number * DAY_S, UTC).strftime("%Y-%m-%d")


def _amounts(record: Mapping[str, Any]) -> dict[str, int | float]:
    amounts: dict[str, int | float] = {"requests": 1, str(record["ending"]): 1}
    amounts |= {name: int(record[name]) for name in COUNTED if record[name]}
    amounts |= {name: int(record[name]) for name in COUNTED_SINCE if record.get(name)}
    cost = record["cost_picousd"]
    if cost is None or not 0 <= cost <= LARGEST:
        return {**amounts, "cost_unknown": 1}
    return {**amounts, "cost_picousd": int(cost), "cost_usd": float(record["cost_usd"])}


def _tokens(record: Mapping[str, Any]) -> str:
    prompt, output = record["prompt_tokens"], record["output_tokens"]
    return "" if prompt is None or output is None else str(prompt + output)
