"""What a request may use of its key's limits, and the scripts that reserve, correct and settle it atomically.

All that is kept of a key lies under one hash tag, so that a cluster keeps it together:

uniroute:limits:{<key id>}:state        requests, tokens: used of each bucket, and …_at when; picodollars: reserved, and
                                        ended, of requests that are over and whose usage records are on the way
uniroute:limits:{<key id>}:held         reservation → tokens:picodollars:day, then :ended once that is what it took
uniroute:limits:{<key id>}:open         reservation, by when it expires
uniroute:limits:{<key id>}:day:<day>    picodollars spent, also :month:<month>; as text, for Lua's numbers end at 2^53

Buckets and reservations go by Redis' own clock, so that replicas with different clocks agree. They are not written to
the append-only file; what was spent is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from proxy.errors import NoEligibleModelError
from proxy.routing.requirements import estimate_document_tokens, estimate_tokens
from proxy.routing.selection import Selection
from proxy.routing.token_limits import TokenLimits, smaller_limit, token_limits_of
from proxy.server.api.translation import Translation
from proxy.settings.litellm_params import merge_model_params
from proxy.settings.schema import Settings
from proxy.storage.client_keys import KeyLimits
from proxy.storage.records import ModelRecord
from proxy.storage.redis import load_script
from proxy.storage.snapshot import RoutingSnapshot
from proxy.upstream.native_api import native_apis
from router_core.pricing import max_price_usd, picousd
from router_core.types import Doubles, Price, frozen

# From the last moment of a request until its usage record must have reached Redis.
MARGIN_S = 30.0

# Fits a counter of 64 bits; $9 million.
MAX_PICOUSD = 9 * 10**18

# Providers that count reasoning within the limit of an answer, at their own addresses.
_REASONING_WITHIN_LIMIT = frozenset(
    ["openai", "azure", "anthropic", "bedrock", "vertex_ai", "gemini", "deepseek", "openrouter", "groq", "mistral"]
)

# Providers whose models may reason beyond the limit, with or without a budget.
_REASONING_BEYOND_LIMIT = frozenset(["dashscope", "xai"])


@frozen
class ReservationRequest:
    """What is to be reserved for one request."""

    id: str
    """Of the reservation."""
    tokens: int
    picousd: int
    ttl_s: float
    """After so long it is released even if nothing is heard of the request."""


Settlement = asyncio.Future[Any]


def _settle_nothing(_tokens: int | None, _picousd: int | None) -> None:
    """Settle a reservation of no tokens and no money."""


@frozen
class Reservation:
    """The permission to send one request, and what is reserved for it."""

    key_id: str
    id: str | None
    """To be settled by the usage record. None: Redis has no such reservation."""
    headers: dict[str, str]
    settle: Callable[[int | None, int | None], Settlement | None] = _settle_nothing
    """Replace what is reserved by the tokens and picodollars that the request took, None where unknown. The future that
    it returns is done, or has failed, when the next request is judged by them."""
    wait_s: float = 0.0
    """How long to wait for that future, at most."""


def limit_to_reserved(selection: Selection, limits: KeyLimits) -> Selection:
    """Keep only the first `max_attempts` candidates if the key has a budget: it is reserved for no others."""
    if not limits.money or len(selection.candidates) <= selection.max_attempts:
        return selection
    return replace(selection, candidates=selection.candidates[: selection.max_attempts])


def drop_pricier_fallbacks(estimate: UsageEstimate) -> Selection:
    """Drop the fallback models that may cost more than the chosen one."""
    selection = estimate.selection
    max_picousd = estimate.picousd(selection.candidates[0])
    cheap_enough = tuple(name for name in selection.candidates if estimate.picousd(name) <= max_picousd)
    return replace(selection, candidates=cheap_enough)


def reservation_request(estimate: UsageEstimate, limits: KeyLimits) -> ReservationRequest:
    """Return what to reserve for a request that any of the models may answer.

    Raises:
        NoEligibleModelError: money is limited, and a model's price is not known.
    """
    tokens = 0 if limits.tokens_per_minute is None else estimate.tokens(limits.tokens_per_minute)
    picodollars = max(estimate.picousd(name) for name in estimate.models) if limits.money else 0
    ttl_s = estimate.settings.request_timeout_s + MARGIN_S
    return ReservationRequest(estimate.selection.id, tokens, min(picodollars, MAX_PICOUSD), ttl_s)


class UsageEstimate:
    """Estimate how many tokens, and how much money, one request may take of each model that may answer it."""

    __slots__ = ("_limits", "_native_prompt", "_sent", "body", "selection", "settings", "snapshot", "translation")

    def __init__(
        self,
        selection: Selection,
        body: Mapping[str, Any],
        snapshot: RoutingSnapshot,
        settings: Settings,
        translation: Translation | None = None,
    ) -> None:
        """
        Args:
            body: the request's, as the caller sent it, or as it was translated.
            translation: of a body that the caller did not send as it is.
        """
        self.selection = selection
        self.body = body
        self.snapshot = snapshot
        self.settings = settings
        self.translation = translation
        self._limits = token_limits_of(body)
        # Tokens of what the caller sent itself, which may hold what no chat body can. None: not counted yet.
        self._native_prompt: int | None = None
        # Model → the tokens of the prompt, and the limits, as they are sent to it.
        self._sent: dict[str, tuple[int, TokenLimits]] = {}

    def of(self, selection: Selection) -> UsageEstimate:
        """Estimate the same request with another selection of models."""
        return UsageEstimate(selection, self.body, self.snapshot, self.settings, self.translation)

    @property
    def models(self) -> Sequence[str]:
        """Return the models that will be tried.

        If money is limited, no other is. Otherwise others take the place of one that is at capacity or in cooldown.
        """
        return self.selection.candidates[: self.selection.max_attempts]

    def tokens(self, per_minute: int) -> int:
        """Return the tokens of prompt and answers. An unlimited answer counts with the usual length, if that fits."""
        return max(self._tokens(name, per_minute) for name in self.models)

    def picousd(self, name: str) -> int:
        """Return the highest cost. Raise NoEligibleModelError if no price of this model is known."""
        prompt, limits = self._as_sent_to(name)
        pool, row, usual = self.snapshot.pool, self.snapshot.pool.index[name], self.settings.reserve_output_tokens
        usual = min(usual, int(pool.max_output_tokens[row]))
        output = limits.output_tokens(usual, thinking_within=_reasons_within_limit(self.snapshot.models[name]))
        if not limits.thinking and self._reasons_beyond_limit(name):
            output += limits.answers * usual
        needs = self.selection.requirements
        largest_usd = max_price_usd(
            prompt,
            output,
            known_price(self.snapshot, name),
            audio_input=needs.audio_input,
            audio_output=needs.audio_output,
        )
        return picousd(largest_usd)

    def _tokens(self, name: str, per_minute: int) -> int:
        prompt, limits = self._as_sent_to(name)
        usual = 0
        if limits.limit is None or limits.unlimited:
            pool = self.snapshot.pool
            usual = round(_mean(pool.output_tokens[pool.index[name]]))
        total = prompt + limits.output_tokens(usual, thinking_within=_reasons_within_limit(self.snapshot.models[name]))
        return total if limits.stated else max(prompt, min(total, per_minute))

    def _as_sent_to(self, name: str) -> tuple[int, TokenLimits]:
        sent = self._sent.get(name)
        if sent is None:
            sent = self._sent[name] = self._work_out(name)
        return sent

    def _work_out(self, name: str) -> tuple[int, TokenLimits]:
        """Return the tokens of the prompt, and the limits, as they are sent to this model."""
        record, needs = self.snapshot.models[name], self.selection.requirements
        prompt, limits = needs.prompt_tokens, self._limits
        if self.translation is not None and self.translation.api in native_apis(record):
            if self._native_prompt is None:
                self._native_prompt = estimate_document_tokens(self.translation.document)
            prompt = max(prompt, self._native_prompt)
        if record.has_body_params:
            sent = merge_model_params(record.litellm_params, self.body)
            prompt, limits = prompt + estimate_tokens(_added(sent, self.body)), token_limits_of(sent)
        if (smaller := smaller_limit(self.snapshot.pool, name, needs)) is not None:
            limits = replace(limits, limit=smaller)
        return prompt, limits

    def _reasons_beyond_limit(self, name: str) -> bool:
        resolved, pool = self.snapshot.models[name].resolved, self.snapshot.pool
        if resolved is None or resolved.provider not in _REASONING_BEYOND_LIMIT:
            return False
        return self.selection.requirements.reasoning or bool(pool.capabilities["reasoning"][pool.index[name]] == 1)


def _added(sent: Mapping[str, Any], body: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model's own parameters add to a body."""
    added = {name: value for name, value in sent.items() if value is not body.get(name)}
    if "messages" in added:
        added["messages"] = sent["messages"][: len(sent["messages"]) - len(body["messages"])]
    return added


def _reasons_within_limit(record: ModelRecord) -> bool:
    resolved = record.resolved
    known = resolved is not None and resolved.provider in _REASONING_WITHIN_LIMIT
    return known and not record.address


def _mean(row: Doubles) -> float:
    """Return what `row.mean()` does, in a fifth of the time."""
    return float(np.add.reduce(row)) / len(row)


def known_price(snapshot: RoutingSnapshot, name: str) -> Price:
    """Return the price of a model whose cost is to be reserved. Raises NoEligibleModelError: it is not known."""
    current = snapshot.prices.get(name)
    if current is None:
        message = f"this key has a spend limit, and no price of the model {name!r} is known; state one, or free: true"
        raise NoEligibleModelError(message, param="model")
    return current.price


PREFIX: Final = "uniroute:limits:"

# After the last cost of that day or month.
DAY_KEPT_S = 8 * 86_400

MONTH_KEPT_S = 62 * 86_400

# A local function `settle` of these parameters: key id, reservation, tokens, picodollars, day, month; all texts.
SETTLE_FUNCTION: Final = load_script(
    __package__, "bucket", "limits", "settle", PREFIX=PREFIX, DAY_KEPT_S=DAY_KEPT_S, MONTH_KEPT_S=MONTH_KEPT_S
)

# KEYS[1]: the key's state, so that a cluster knows where. ARGV: the parameters of `settle`.
SETTLE: Final = f"{SETTLE_FUNCTION}return settle(unpack(ARGV))\n"

END: Final = load_script(__package__, "bucket", "limits", "end_reservation", PREFIX=PREFIX)

RESERVE: Final = load_script(__package__, "bucket", "limits", "date", "reserve", PREFIX=PREFIX)


def state_key(key_id: str) -> str:
    return f"{PREFIX}{{{key_id}}}:state"
