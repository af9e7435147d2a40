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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np
from redis.exceptions import NoScriptError, ReadOnlyError, RedisError

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
from proxy.storage.redis import Availability, Store, StoreUnavailable, encode_command, load_script
from proxy.storage.redis_connections import PipelinedConnection
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


@dataclass(slots=True, eq=False)
class PendingCall:
    command: bytes
    answer: asyncio.Future[Any]
    on_abandoned: Callable[[], None]

    def end(self, outcome: Any) -> None:
        """Hand over the answer, or the error, unless the caller was cancelled meanwhile."""
        if self.answer.done():
            self.on_abandoned()
        elif isinstance(outcome, StoreUnavailable):
            self.answer.set_exception(outcome)
        elif isinstance(outcome, RedisError):
            error = StoreUnavailable(f"could not {_WHAT}: Redis says {outcome}")
            error.__cause__ = outcome
            self.answer.set_exception(error)
        else:
            self.answer.set_result(outcome)


def _nobody() -> None:
    """Take notice of an answer that nobody waits for."""


class ScriptBatcher:
    """Call scripts over one connection, in one round trip what is called within a turn of the event loop.

    One round trip is on its way at a time; what is called meanwhile goes with the next. One batcher per process.
    """

    def __init__(self, store: Store, scripts: Collection[str], timeout_s: float = TIMEOUT_S) -> None:
        self._store = store
        self._timeout_s = timeout_s
        self._digests = {script: store.client.register_script(script).sha for script in scripts}
        self._waiting: deque[PendingCall] = deque()
        self._availability = Availability(retry_interval_s=RETRY_INTERVAL_S)
        self._connection: PipelinedConnection | None = None
        self._tasks = BackgroundTasks()
        self._closed = False
        # Of the round trip that is on its way.
        self._busy = False
        self._batch: list[PendingCall] = []
        self._commands = b""
        self._sent_again = False
        self._slices_left = 0
        self._slice: asyncio.TimerHandle | None = None
        self._opening: asyncio.Task[None] | None = None

    @property
    def available(self) -> bool:
        """Return False from the first silence of Redis until it answers again."""
        return self._availability.available

    def call(
        self, script: str, key: str, arguments: Sequence[str], on_abandoned: Callable[[], None] = _nobody
    ) -> asyncio.Future[Any]:
        """Call one of the scripts. It is called, once it is passed here, even if the future is cancelled.

        Args:
            on_abandoned: is called after the script, or after its failure, if the future was cancelled.

        Raises:
            StoreUnavailableNow: at once, after a silence, until Redis answers again.
            StoreUnavailable: by the future: an error instead of an answer, or none in time. It may have been run.
        """
        if self._closed or not self._availability.available:
            raise StoreUnavailableNow(_CLOSING if self._closed else self._availability.reason)
        loop = asyncio.get_running_loop()
        command = encode_command(("EVALSHA", self._digests[script], "1", key, *arguments))
        call = PendingCall(command, loop.create_future(), on_abandoned)
        self._waiting.append(call)
        if not self._busy:
            self._busy = True
            loop.call_soon(self._send_batch)
        return call.answer

    async def close(self) -> None:
        """Stop. Calls that have no answer yet fail."""
        self._closed = True
        self._fail(StoreUnavailable(_CLOSING), StoreUnavailableNow(_CLOSING))
        await cancel_and_wait(self._opening)
        await self._tasks.close()
        if self._connection is not None:
            await self._connection.dispose()
            self._connection = None

    def _send_batch(self) -> None:
        waiting = self._waiting
        if not waiting:
            self._busy = False
            return
        self._batch = [waiting.popleft() for _ in range(min(MAX_BATCH_SIZE, len(waiting)))]
        self._commands = b"".join([call.command for call in self._batch])
        self._sent_again = False
        self._slices_left = max(1, round(self._timeout_s / SLICE_S))
        self._slice = asyncio.get_running_loop().call_later(SLICE_S, self._end_slice)
        connection = self._connection
        if connection is not None and connection.is_open and not self._store.is_silent:
            connection.send(self._commands, len(self._batch), self._receive)
        else:
            self._send_anew()

    def _receive(self, replies: list[Any] | RedisError) -> None:
        if self._is_to_be_sent_again(replies):
            self._sent_again = True
            self._send_anew()
            return
        if isinstance(replies, RedisError):
            error = StoreUnavailable(f"could not {_WHAT}: Redis at {self._store.name} says {replies}")
            error.__cause__ = replies
            self._give_up(error)
            return
        batch = self._end_batch()
        for call, reply in zip(batch, replies, strict=True):
            call.end(reply)
        self._send_batch()

    def _is_to_be_sent_again(self, replies: list[Any] | RedisError) -> bool:
        """Whether a new connection may help: the scripts may be run twice. A script is loaded with each connection."""
        if isinstance(replies, RedisError):
            return not self._sent_again
        for reply in replies:
            if isinstance(reply, NoScriptError):
                return True
            if isinstance(reply, ReadOnlyError) and self._connection is not None and self._connection.has_sentinels:
                return not self._sent_again
        return False

    def _send_anew(self) -> None:
        """Send the batch over a new connection."""
        self._opening = asyncio.create_task(self._open_and_send(), name="uniroute-limits-asking")

    async def _open_and_send(self) -> None:
        former, self._connection = self._connection, None
        try:
            if former is not None:
                await former.dispose()
            async with self._store.operation(_WHAT) as client:
                connection = await PipelinedConnection.open(client)
                try:
                    await self._load_scripts(connection)
                except BaseException:
                    await connection.dispose()
                    raise
        except StoreUnavailable as error:
            self._give_up(error)
            return
        self._connection = connection
        connection.send(self._commands, len(self._batch), self._receive)

    async def _load_scripts(self, connection: PipelinedConnection) -> None:
        """Raise RedisError."""
        loaded: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        commands = [encode_command(("SCRIPT", "LOAD", script)) for script in self._digests]
        connection.send(b"".join(commands), len(commands), partial(_set_if_pending, loaded))
        replies = await loaded
        for reply in [replies] if isinstance(replies, RedisError) else replies:
            if isinstance(reply, RedisError):
                raise reply

    def _end_slice(self) -> None:
        self._slices_left -= 1
        if self._slices_left:
            self._slice = asyncio.get_running_loop().call_later(SLICE_S, self._end_slice)
            return
        waited = f"{self._timeout_s * 1000:.0f} ms"
        self._give_up(
            StoreUnavailable(f"could not {_WHAT}: Redis at {self._store.name} did not answer within {waited}")
        )

    def _give_up(self, error: StoreUnavailable) -> None:
        """Fail what is on its way and what waits, and ask until Redis answers again."""
        if self._opening is not None and self._opening is not asyncio.current_task():
            self._opening.cancel()
        if self._connection is not None:
            self._connection.abort()  # a late answer would be taken for another's
        self._availability.mark_unavailable(str(error))
        self._fail(error, StoreUnavailableNow(str(error)))
        if self._closed:
            return
        poll = partial(self._availability.poll, self._answers_in_time)
        self._tasks.start("uniroute-limits-listening", poll, restart=False)

    def _end_batch(self) -> list[PendingCall]:
        if self._slice is not None:
            self._slice.cancel()
        batch, self._batch = self._batch, []
        return batch

    def _fail(self, error: StoreUnavailable, unsent: StoreUnavailableNow) -> None:
        for call in self._end_batch():
            call.end(error)
        while self._waiting:
            self._waiting.popleft().end(unsent)
        self._busy = False

    async def _answers_in_time(self) -> bool:
        loop = asyncio.get_running_loop()
        asked_at = loop.time()
        return await self._store.available() and loop.time() - asked_at <= self._timeout_s


def _set_if_pending(future: asyncio.Future[Any], outcome: Any) -> None:
    if not future.done():
        future.set_result(outcome)
