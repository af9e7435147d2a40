"""How a key stands against its limits, and how that is told in OpenAI's headers. Decides nothing."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from proxy.limits.bucket import fill_s
from proxy.storage.client_keys import KeyLimits


@dataclass(frozen=True, slots=True)
class Standing:
    """What is used, this request included where it was granted."""

    requests: float
    tokens: float
    spent_picousd: dict[str, int] = field(default_factory=dict)
    """Of the day and the month. Empty: not known here."""
    reserved_picousd: int = 0
    now: float = 0.0
    """Unix seconds by Redis' clock."""

    @classmethod
    def of_reply(cls, reply: Sequence[str]) -> Standing:
        """What the script `RESERVE` says after its verdict."""
        requests, tokens, day, month, reserved, ended, now = reply
        spent = {"day": int(day) + int(ended), "month": int(month) + int(ended)}
        return cls(float(requests), float(tokens), spent, int(reserved), float(now))


Settling = asyncio.Future[Any]


def _not_kept(_: int | None, __: int | None) -> None:
    """Of nothing that was set aside."""


@dataclass(frozen=True, slots=True)
class Granted:
    """A request that may be sent."""

    key_id: str
    reservation: str | None
    """To be settled by the usage record. None: there is none in Redis."""
    headers: dict[str, str]
    used: Callable[[int | None, int | None], Settling | None] = _not_kept
    """Is told the tokens and picodollars that the request took, as far as they are known. What it returns is done, or
    has failed, when the next request is judged by them."""
    wait_s: float = 0.0
    """How long that is waited for at most."""


def rate_headers(limits: KeyLimits, standing: Standing) -> dict[str, str]:
    """`x-ratelimit-limit-requests`, `-remaining-` and `-reset-`, and the same of tokens; of those that are limited."""
    kinds = (
        ("requests", limits.requests_per_minute, standing.requests),
        ("tokens", limits.tokens_per_minute, standing.tokens),
    )
    headers: dict[str, str] = {}
    for kind, per_minute, used in kinds:
        if per_minute is not None:
            headers[f"x-ratelimit-limit-{kind}"] = str(per_minute)
            headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(per_minute - used)))
            headers[f"x-ratelimit-reset-{kind}"] = duration(fill_s(used, per_minute))
    return headers


def duration(seconds: float) -> str:
    """As OpenAI writes it: `12ms`, `1s`, `8.64s`, `6m0s`, `1h0m0s`."""
    milliseconds = math.ceil(seconds * 1000 - 1e-6)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    return f"{hours}h{text}" if hours else text
