"""What a request may use of its key's limits, and the scripts that reserve, correct and settle it atomically.

All that is kept of a key lies under one hash tag, so that a cluster keeps it together:

uniroute:limits:{<key id>}:state        requests, tokens: used of each bucket, and …_at when; picodollars: reserved, and
                                        ended, of requests that are over and whose usage records are on the way
uniroute:limits:{<key id>}:held         reservation → tokens:picodollars:day, then :ended once that is what it took
uniroute:limits:{<key id>}:open         reservation, by when it expires
uniroute:limits:{<key id>}:day:<day>    picodollars spent, also :month:<month>; as text, for Lua's numbers end at 2^53

Buckets and reservations go by Redis' own clock, so that replicas with different clocks agree.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Final

import numpy as np
from redis.exceptions import NoScriptError, RedisError
from redis.exceptions import TimeoutError as NoAnswer

from proxy.concurrency import BackgroundTasks, cancel_and_wait
from proxy.errors import NoEligibleModelError
from proxy.routing.requirements import estimate_document_tokens, estimate_tokens
from proxy.routing.selection import Selection
from proxy.routing.token_limits import TokenLimits, token_limits_of
from proxy.server.api.translation import Translation
from proxy.settings.litellm_params import merge_model_params
from proxy.settings.schema import Settings
from proxy.storage.client_keys import KeyLimits
from proxy.storage.records import ModelRecord
from proxy.storage.redis import Availability, Store, StoreUnavailable, encode_command, load_script, pipeline
from proxy.storage.snapshot import RoutingSnapshot
from proxy.upstream.native_api import native_apis
from router_core.pricing import max_price_usd, picousd
from router_core.types import Doubles, Price

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


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
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
    """Drop the models that nothing is reserved for, if the key has a budget, however many others are at capacity."""
    if not limits.money:
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


@dataclass(frozen=True)
class UsageEstimate:
    """Estimate how many tokens, and how much money, one request may take of each model that may answer it."""

    selection: Selection
    body: Mapping[str, Any]
    """The request's, as the caller sent it."""
    snapshot: RoutingSnapshot
    settings: Settings
    translation: Translation | None = None
    """Of a body that the caller did not send as it is."""

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

    @cached_property
    def _limits(self) -> TokenLimits:
        return token_limits_of(self.body)

    @cached_property
    def _native_prompt(self) -> int:
        """Return the tokens of what the caller sent itself, which may hold what no chat body can."""
        return 0 if self.translation is None else estimate_document_tokens(self.translation.document)

    def _tokens(self, name: str, per_minute: int) -> int:
        prompt, limits = self._as_sent_to(name)
        pool = self.snapshot.pool
        usual = round(_mean(pool.output_tokens[pool.index[name]]))
        total = prompt + limits.output_tokens(usual, thinking_within=_reasons_within_limit(self.snapshot.models[name]))
        return total if limits.stated else max(prompt, min(total, per_minute))

    def _as_sent_to(self, name: str) -> tuple[int, TokenLimits]:
        """Return the tokens of the prompt, and the limits, as they are sent to this model."""
        record, needs = self.snapshot.models[name], self.selection.requirements
        prompt, limits = needs.prompt_tokens, self._limits
        if self.translation is not None and self.translation.api in native_apis(record):
            prompt = max(prompt, self._native_prompt)
        if record.has_body_params:
            sent = merge_model_params(record.litellm_params, self.body)
            prompt, limits = prompt + estimate_tokens(_added(sent, self.body)), token_limits_of(sent)
        sent_limit = self.selection.output_limit_for(self.snapshot.pool, name)
        if sent_limit != needs.max_output_tokens:
            limits = replace(limits, limit=sent_limit)
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


TIMEOUT_S = 0.05

# A silent Redis is waited for in slices, each of which ends only after the event loop has looked for an answer: while
# this process itself is busy a slice takes longer, and that is no silence.
SLICE_S = 0.01

RETRY_INTERVAL_S = 1.0

# Calls of one round trip. Redis runs all of them before it answers the first: more would look like a silence.
MAX_BATCH_SIZE = 32

_WHAT = "check the limits of a key"

_CLOSING = f"could not {_WHAT}: the server is shutting down"


class StoreUnavailableNow(StoreUnavailable):
    """Redis was silent a moment ago. Nothing was sent to it."""


@dataclass(frozen=True, slots=True, eq=False)
class PendingCall:
    digest: str
    """Of the script."""
    key: str
    arguments: Collection[str | int | float]
    answer: asyncio.Future[Any]


class ScriptBatcher:
    """Call scripts over one connection at a time, many in one round trip. One per process."""

    def __init__(self, store: Store, scripts: Collection[str], timeout_s: float = TIMEOUT_S) -> None:
        self._store = store
        self._timeout_s = timeout_s
        self._digests = {script: store.client.register_script(script).sha for script in scripts}
        self._waiting: deque[PendingCall] = deque()
        self._availability = Availability(retry_interval_s=RETRY_INTERVAL_S)
        self._sending: asyncio.Task[None] | None = None
        self._tasks = BackgroundTasks()

    @property
    def available(self) -> bool:
        """Return False from the first silence of Redis until it answers again."""
        return self._availability.available

    def call(self, script: str, key: str, arguments: Collection[str | int | float]) -> asyncio.Future[Any]:
        """Call one of the scripts. The future gets its answer, even if the caller no longer waits for it.

        Raises:
            StoreUnavailableNow: at once, after a silence, until Redis answers again.
            StoreUnavailable: by the future: an error instead of an answer, or none in time. It may have been run.
        """
        if not self._availability.available:
            raise StoreUnavailableNow(self._availability.reason)
        call = PendingCall(self._digests[script], key, arguments, asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send_all(), name="uniroute-limits-asking")
        return call.answer

    async def close(self) -> None:
        await cancel_and_wait(self._sending)
        await self._tasks.close()
        _fail_all(self._waiting, StoreUnavailableNow(_CLOSING))

    async def _send_all(self) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(MAX_BATCH_SIZE, len(self._waiting)))]
            try:
                for call, answer in zip(batch, await self._within_timeout(batch), strict=True):
                    _resolve(call, answer)
            except StoreUnavailable as error:
                self._mark_unavailable(error, batch)
            finally:
                _fail_all(batch, StoreUnavailable(_CLOSING))  # in any case, so that no caller waits for ever

    async def _within_timeout(self, batch: list[PendingCall]) -> list[Any]:
        sending = asyncio.create_task(self._send(batch))
        try:
            for _ in range(max(1, round(self._timeout_s / SLICE_S))):
                await asyncio.wait({sending}, timeout=SLICE_S)
                if sending.done():
                    if not _timed_out(sending):
                        return sending.result()
                    sending = asyncio.create_task(self._send(batch))  # this process was too busy to see an answer
        finally:
            if not sending.done():
                sending.add_done_callback(_retrieve)
                sending.cancel()
        waited = f"{self._timeout_s * 1000:.0f} ms"
        raise StoreUnavailable(f"could not {_WHAT}: Redis at {self._store.name} did not answer within {waited}")

    async def _send(self, batch: list[PendingCall]) -> list[Any]:
        """Send in one round trip; in a few if Redis does not know a script yet."""
        async with self._store.operation(_WHAT) as client:
            answers = await pipeline(client, [_command(call) for call in batch])
            if not any(isinstance(answer, NoScriptError) for answer in answers):
                return answers
            for script in self._digests:
                await client.script_load(script)
        return await self._send(batch)

    def _mark_unavailable(self, error: StoreUnavailable, batch: list[PendingCall]) -> None:
        self._availability.mark_unavailable(str(error))
        _fail_all(batch, error)
        _fail_all(self._waiting, StoreUnavailableNow(str(error)))
        self._waiting.clear()
        poll = partial(self._availability.poll, self._answers_in_time)
        self._tasks.start("uniroute-limits-listening", poll, restart=False)

    async def _answers_in_time(self) -> bool:
        loop = asyncio.get_running_loop()
        asked_at = loop.time()
        return await self._store.available() and loop.time() - asked_at <= self._timeout_s


def _command(call: PendingCall) -> bytes:
    return encode_command(("EVALSHA", call.digest, "1", call.key, *map(str, call.arguments)))


def _resolve(call: PendingCall, answer: Any) -> None:
    if isinstance(answer, RedisError):
        error = StoreUnavailable(f"could not {_WHAT}: Redis says {answer}")
        error.__cause__ = answer
        _fail_all([call], error)
    else:
        call.answer.set_result(answer)


def _fail_all(calls: Iterable[PendingCall], error: StoreUnavailable) -> None:
    for call in calls:
        if not call.answer.done():
            call.answer.set_exception(error)


def _timed_out(sending: asyncio.Task[Any]) -> bool:
    error = sending.exception()
    return error is not None and isinstance(error.__cause__, (TimeoutError, NoAnswer))


def _retrieve(sending: asyncio.Task[Any]) -> None:
    _ = sending.cancelled() or sending.exception()  # else asyncio logs the exception as never retrieved
