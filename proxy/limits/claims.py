"""How much one request may use at most, as far as that can be known before. No store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from proxy.errors import NothingAble
from proxy.routing.requirements import estimate_tokens
from proxy.routing.selection import Choice
from proxy.routing.sizes import Sizes, sizes_of
from proxy.settings.schema import Settings
from proxy.storage.client_keys import KeyLimits
from proxy.storage.models import ModelRecord
from proxy.storage.snapshot import RoutingState
from proxy.upstream.litellm.params import arm_body, fixes_parameters
from proxy.upstream.origins import address_of
from proxy.words import words
from router_core.pricing import max_price_usd, picousd
from router_core.types import Doubles, Price

MARGIN_S = 30.0
"""From the last moment of a request until its usage record must have reached Redis."""
MOST_PICOUSD = 9 * 10**18
"""What still fits a counter of 64 bits; $9 million."""

_THINKING_WITHIN = words("openai azure anthropic bedrock vertex_ai gemini deepseek openrouter groq mistral")
"""Providers that count reasoning within the limit of an answer, at their own addresses."""
_THINKING_APART = words("dashscope xai")
"""Those whose models may reason beyond it, with or without a budget."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What is set aside for one request."""

    id: str
    """Of the reservation."""
    tokens: int
    picousd: int
    lives_s: float
    """After so long it is given back even if nobody says what became of the request."""


@dataclass(frozen=True)
class Demand:
    """What one request may take of each model that may be asked."""

    choice: Choice
    body: Mapping[str, Any]
    """As the caller sent it."""
    state: RoutingState
    settings: Settings

    @property
    def asked(self) -> Sequence[str]:
        """Who will be asked; where money is limited nobody else, and otherwise unless one of them is busy or rests."""
        return self.choice.order[: self.choice.attempts]

    def tokens(self, per_minute: int) -> int:
        """Prompt and answers. Answers that nothing limits are taken to be as long as usual, if that fits at all."""
        return max(self._tokens(name, per_minute) for name in self.asked)

    def picousd(self, name: str) -> int:
        """Raises NothingAble: no price of this model is known."""
        prompt, sizes = self._sent_to(name)
        pool, row, usual = self.state.pool, self.state.pool.index[name], self.settings.reserve_output_tokens
        usual = min(usual, int(pool.max_output_tokens[row]))
        output = sizes.output_tokens(usual, thinking_within=_thinks_within(self.state.models[name]))
        if not sizes.thinking and self._thinks_apart(name):
            output += sizes.answers * usual
        needs = self.choice.needs
        largest_usd = max_price_usd(
            prompt,
            output,
            _price(self.state, name),
            audio_input=needs.audio_input,
            audio_output=needs.audio_output,
        )
        return picousd(largest_usd)

    @cached_property
    def _sizes(self) -> Sizes:
        return sizes_of(self.body)

    def _tokens(self, name: str, per_minute: int) -> int:
        prompt, sizes = self._sent_to(name)
        pool = self.state.pool
        usual = round(_mean(pool.output_tokens[pool.index[name]]))
        whole = prompt + sizes.output_tokens(usual, thinking_within=_thinks_within(self.state.models[name]))
        return whole if sizes.stated else max(prompt, min(whole, per_minute))

    def _sent_to(self, name: str) -> tuple[int, Sizes]:
        """Tokens of the prompt, and the sizes, as this model is told them."""
        record, needs = self.state.models[name], self.choice.needs
        prompt, sizes = needs.prompt_tokens, self._sizes
        if fixes_parameters(record.litellm_params):
            sent = arm_body(record.litellm_params, self.body)
            prompt, sizes = prompt + estimate_tokens(_added(sent, self.body)), sizes_of(sent)
        told = self.choice.told_limit(self.state.pool, name)
        if told != needs.max_output_tokens:
            sizes = replace(sizes, limit=told)
        return prompt, sizes

    def _thinks_apart(self, name: str) -> bool:
        resolved, pool = self.state.models[name].resolved, self.state.pool
        if resolved is None or resolved.provider not in _THINKING_APART:
            return False
        return self.choice.needs.reasoning or bool(pool.able["reasoning"][pool.index[name]] == 1)


def within_claim(choice: Choice, limits: KeyLimits) -> Choice:
    """Of a key with a budget no others are asked than those that money is set aside for, however many are busy."""
    return replace(choice, order=choice.order[: choice.attempts]) if limits.money else choice


def no_dearer(demand: Demand) -> Choice:
    """Without the models to fall back on that may cost more than the chosen one."""
    choice = demand.choice
    most = demand.picousd(choice.order[0])
    return replace(choice, order=tuple(name for name in choice.order if demand.picousd(name) <= most))


def claim_of(demand: Demand, limits: KeyLimits) -> Claim:
    """Of a request that any model which is asked may answer.

    Raises:
        NothingAble: money is limited, and a model's price is not known.
    """
    tokens = 0 if limits.tokens_per_minute is None else demand.tokens(limits.tokens_per_minute)
    picodollars = max(demand.picousd(name) for name in demand.asked) if limits.money else 0
    lives_s = demand.settings.request_timeout_s + MARGIN_S
    return Claim(demand.choice.id, tokens, min(picodollars, MOST_PICOUSD), lives_s)


def _added(sent: Mapping[str, Any], body: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's own parameters add to a body."""
    added = {name: value for name, value in sent.items() if value is not body.get(name)}
    if "messages" in added:
        added["messages"] = sent["messages"][: len(sent["messages"]) - len(body["messages"])]
    return added


def _thinks_within(record: ModelRecord) -> bool:
    resolved = record.resolved
    known = resolved is not None and resolved.provider in _THINKING_WITHIN
    return known and not address_of(record.litellm_params)


def _mean(row: Doubles) -> float:
    """As its method, in a fifth of the time."""
    return float(np.add.reduce(row)) / len(row)


def _price(state: RoutingState, name: str) -> Price:
    live = state.prices.get(name)
    if live is None:
        message = f"this key has a spend limit, and no price of the model {name!r} is known; state one, or free: true"
        raise NothingAble(message, param="model")
    return live.price
