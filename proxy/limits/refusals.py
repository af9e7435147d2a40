"""What a key is told that has used up a limit: which, how far, and when it goes on. Decides nothing."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

from proxy.errors import BudgetExceeded, RateLimited, Unavailable
from proxy.limits.bucket import wait_s
from proxy.limits.claims import Claim
from proxy.limits.standing import Standing, rate_headers
from proxy.storage.client_keys import KeyLimits
from router_core.pricing import PICO, picousd

LONGEST_WAIT_S = 3600
NEVER = {"x-should-retry": "false"}
"""OpenAI's clients ask a 429 again otherwise."""


def rate_limited(kind: str, limits: KeyLimits, standing: Standing, claim: Claim) -> RateLimited:
    """`kind`: requests or tokens."""
    if kind == "requests":
        per_minute, used, amount = limits.requests_per_minute or 0, standing.requests, 1
    else:
        per_minute, used, amount = limits.tokens_per_minute or 0, standing.tokens, claim.tokens
    wait = max(1, math.ceil(min(wait_s(used, amount, per_minute), LONGEST_WAIT_S)))
    left = max(0, math.floor(per_minute - used))
    return RateLimited(
        f"this key may use {per_minute:,} {kind} per minute; {left:,} are left, and this request needs {amount:,}:"
        f" try again in {wait} s",
        headers={"retry-after": str(wait), **rate_headers(limits, standing)},
    )


def too_large(limits: KeyLimits, claim: Claim) -> RateLimited:
    return RateLimited(
        f"this key may use {limits.tokens_per_minute or 0:,} tokens per minute, and this request alone may take"
        f" {claim.tokens:,}; shorten the prompt, or state a smaller max_tokens",
        headers=NEVER,
    )


def budget_exceeded(period: str, limits: KeyLimits, standing: Standing, claim: Claim) -> BudgetExceeded:
    """`period`: day or month."""
    limit_usd = (limits.usd_per_day if period == "day" else limits.usd_per_month) or 0.0
    spent = standing.spent_picousd[period]
    told = (
        f"this key may spend {dollars(picousd(limit_usd))} a {period}: {dollars(spent)} are spent,"
        f" {dollars(standing.reserved_picousd)} are set aside for requests under way, and this one may cost"
        f" {dollars(claim.picousd)}; "
    )
    if spent + claim.picousd <= picousd(limit_usd):
        return BudgetExceeded(told + "try again when they have ended", headers={"retry-after": "1"})
    return BudgetExceeded(f"{told}it begins again at {next_start(period, standing.now)}", headers=NEVER)


def not_checked(why: str) -> Unavailable:
    message = f"the budget of this key cannot be checked now, and it has a spend limit: {why}"
    return Unavailable(message, headers={"retry-after": "1"})


def next_start(period: str, now: float) -> str:
    """When the day or month after `now`, Unix seconds, begins."""
    today = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    after = today + timedelta(days=1) if period == "day" else (today.replace(day=1) + timedelta(days=32)).replace(day=1)
    return after.strftime("%Y-%m-%dT%H:%M:%SZ")


def dollars(picodollars: int) -> str:
    """To a millionth of a dollar, or exactly where it is less."""
    whole, rest = divmod(picodollars, PICO)
    digits = f"{rest:012d}"
    shown = digits[:6] if whole or rest >= 10**6 else digits
    return f"${whole}.{shown}".rstrip("0").rstrip(".")
