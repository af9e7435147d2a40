"""How much one request may use at most, as far as that can be known before. No store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from proxy.errors import NothingAble
from proxy.routing.choosing import Choice
from proxy.settings import Settings
from proxy.state.key_limits import KeyLimits
from proxy.state.snapshot import RoutingState
from router_core.pricing import picousd
from router_core.types import Doubles, Price

MARGIN_S = 30.0
"""From the last moment of a request until its usage record must have reached Redis."""
MOST_PICOUSD = 9 * 10**18
"""What still fits a counter of 64 bits; $9 million."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What is set aside for one request."""

    id: str
    """Of the reservation."""
    tokens: int
    picousd: int
    lives_s: float
    """After so long it is given back even if nobody says what became of the request."""


def within_claim(choice: Choice, limits: KeyLimits) -> Choice:
    """Of a key with a budget no others are asked than those that money is set aside for, however many are busy."""
    return replace(choice, order=choice.order[: choice.attempts]) if limits.money else choice


def no_dearer(choice: Choice, state: RoutingState, settings: Settings) -> Choice:
    """Without the models to fall back on that may cost more than the chosen one."""
    most = _picousd(choice, state, settings, choice.order[0])
    left = tuple(name for name in choice.order if _picousd(choice, state, settings, name) <= most)
    return replace(choice, order=left)


def claim_of(choice: Choice, state: RoutingState, settings: Settings, limits: KeyLimits) -> Claim:
    """Of a request that any model which is asked may answer.

    Raises:
        NothingAble: money is limited, and a model's price is not known.
    """
    tokens = 0 if limits.tokens_per_minute is None else _tokens(choice, state, limits.tokens_per_minute)
    picodollars = max(_picousd(choice, state, settings, name) for name in _asked(choice)) if limits.money else 0
    return Claim(choice.id, tokens, min(picodollars, MOST_PICOUSD), settings.request_timeout_s + MARGIN_S)


def _asked(choice: Choice) -> Sequence[str]:
    """Who will be asked; where money is limited nobody else, and otherwise unless one of them is busy or rests."""
    return choice.order[: choice.attempts]


def _tokens(choice: Choice, state: RoutingState, per_minute: int) -> int:
    """Prompt and answers. Answers that nothing limits are taken to be as long as usual, if that fits at all."""
    needs, pool = choice.needs, state.pool
    if needs.max_output_tokens is not None:
        return needs.prompt_tokens + needs.answers * needs.max_output_tokens
    usual = max(_mean(pool.output_tokens[pool.index[name]]) for name in _asked(choice))
    return max(needs.prompt_tokens, min(needs.prompt_tokens + needs.answers * round(usual), per_minute))


def _mean(row: Doubles) -> float:
    """As its method, in a fifth of the time."""
    return float(np.add.reduce(row)) / len(row)


def _picousd(choice: Choice, state: RoutingState, settings: Settings, name: str) -> int:
    needs, pool = choice.needs, state.pool
    stated = settings.reserve_output_tokens if needs.max_output_tokens is None else needs.max_output_tokens
    output = needs.answers * min(stated, int(pool.max_output_tokens[pool.index[name]]))
    price = _price(state, name)
    return picousd(needs.prompt_tokens * price.input_cost_per_token + output * price.output_cost_per_token)


def _price(state: RoutingState, name: str) -> Price:
    live = state.prices.get(name)
    if live is None:
        message = f"this key has a spend limit, and no price of the model {name!r} is known; state one, or free: true"
        raise NothingAble(message, param="model")
    return live.price
