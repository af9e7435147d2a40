"""The Lua of the limits: every change of what a key has used, in one atomic step. Who runs it is limiter.

All that is kept of a key lies under one hash tag, so that a cluster keeps it together:

uniroute:limits:{<key id>}:state        requests, tokens: used of each bucket, and …_at when; picodollars: reserved, and
                                        ended, of requests that are over and whose usage records are on the way
uniroute:limits:{<key id>}:held         reservation → tokens:picodollars:day, then :ended once that is what it took
uniroute:limits:{<key id>}:open         reservation, by when it ends
uniroute:limits:{<key id>}:day:<day>    picodollars spent, also :month:<month>; as text, for Lua's numbers end at 2^53

Buckets and reservations go by Redis' own clock, so that replicas with different clocks agree.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
from redis.exceptions import NoScriptError, RedisError
from redis.exceptions import TimeoutError as RanOut

from proxy.concurrency import cancel_and_wait
from proxy.errors import NoEligibleModelError
from proxy.routing.requirements import estimate_tokens
from proxy.routing.selection import Selection
from proxy.routing.sizes import Sizes, sizes_of
from proxy.settings.litellm_params import has_body_params, merge_model_params
from proxy.settings.schema import Settings
from proxy.storage.client_keys import KeyLimits
from proxy.storage.models import ModelRecord
from proxy.storage.redis import Store, StoreUnavailable, encode_command, load_script, pipeline
from proxy.storage.snapshot import RoutingSnapshot
from proxy.upstream.key_scope import address_of
from router_core.pricing import max_price_usd, picousd
from router_core.types import Doubles, Price

PREFIX: Final = "uniroute:limits:"

DAY_KEPT_S = 8 * 86_400

MONTH_KEPT_S = 62 * 86_400
"""After the last cost of that period."""

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


MARGIN_S = 30.0
"""From the last moment of a request until its usage record must have reached Redis."""

MAX_PICOUSD = 9 * 10**18
"""What still fits a counter of 64 bits; $9 million."""

_THINKING_WITHIN = frozenset("openai azure anthropic bedrock vertex_ai gemini deepseek openrouter groq mistral".split())
"""Providers that count reasoning within the limit of an answer, at their own addresses."""

_THINKING_APART = frozenset("dashscope xai".split())
"""Those whose models may reason beyond it, with or without a budget."""


@dataclass(frozen=True, slots=True)
class ReservationRequest:
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

    choice: Selection
    body: Mapping[str, Any]
    """As the caller sent it."""
    state: RoutingSnapshot
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
        if has_body_params(record.litellm_params):
            sent = merge_model_params(record.litellm_params, self.body)
            prompt, sizes = prompt + estimate_tokens(_added(sent, self.body)), sizes_of(sent)
        told = self.choice.told_limit(self.state.pool, name)
        if told != needs.max_output_tokens:
            sizes = replace(sizes, limit=told)
        return prompt, sizes

    def _thinks_apart(self, name: str) -> bool:
        resolved, pool = self.state.models[name].resolved, self.state.pool
        if resolved is None or resolved.provider not in _THINKING_APART:
            return False
        return self.choice.needs.reasoning or bool(pool.capabilities["reasoning"][pool.index[name]] == 1)


def limit_to_reserved(choice: Selection, limits: KeyLimits) -> Selection:
    """Of a key with a budget no others are asked than those that money is set aside for, however many are busy."""
    return replace(choice, order=choice.order[: choice.attempts]) if limits.money else choice


def drop_pricier_fallbacks(demand: Demand) -> Selection:
    """Without the models to fall back on that may cost more than the chosen one."""
    choice = demand.choice
    most = demand.picousd(choice.order[0])
    return replace(choice, order=tuple(name for name in choice.order if demand.picousd(name) <= most))


def estimate_reservation(demand: Demand, limits: KeyLimits) -> ReservationRequest:
    """Of a request that any model which is asked may answer.

    Raises:
        NothingAble: money is limited, and a model's price is not known.
    """
    tokens = 0 if limits.tokens_per_minute is None else demand.tokens(limits.tokens_per_minute)
    picodollars = max(demand.picousd(name) for name in demand.asked) if limits.money else 0
    lives_s = demand.settings.request_timeout_s + MARGIN_S
    return ReservationRequest(demand.choice.id, tokens, min(picodollars, MAX_PICOUSD), lives_s)


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


def _price(state: RoutingSnapshot, name: str) -> Price:
    live = state.prices.get(name)
    if live is None:
        message = f"this key has a spend limit, and no price of the model {name!r} is known; state one, or free: true"
        raise NoEligibleModelError(message, param="model")
    return live.price


TIMEOUT_S = 0.05

SLICE_S = 0.01
"""A silent Redis is waited for in slices. While this process itself is busy a slice takes longer, and that is no
silence: each ends only after the event loop has looked for an answer."""

PAUSE_S = 1.0

MAX_BATCH_SIZE = 32
"""In one round trip. Redis runs them before it answers the first: more of them would look like a silence."""

_WHAT = "check the limits of a key"

_ENDED = f"could not {_WHAT}: the server is shutting down"


class StoreUnavailableNow(StoreUnavailable):
    """Redis was silent a moment ago. Nothing was sent to it."""


@dataclass(frozen=True, slots=True, eq=False)
class PendingCall:
    script: str
    """Its digest."""
    key: str
    arguments: Collection[str | int | float]
    answer: asyncio.Future[Any]


class ScriptBatcher:
    """Scripts, asked over one connection at a time. One per process."""

    def __init__(self, store: Store, scripts: Collection[str], timeout_s: float = TIMEOUT_S) -> None:
        self._store = store
        self._timeout_s = timeout_s
        self._digests = {script: store.client.register_script(script).sha for script in scripts}
        self._waiting: deque[PendingCall] = deque()
        self._silent: str | None = None
        self._asking: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None

    @property
    def silent(self) -> bool:
        return self._silent is not None

    def ask(self, script: str, key: str, arguments: Collection[str | int | float]) -> asyncio.Future[Any]:
        """The answer of one of the scripts; it comes also where nobody waits for it any more.

        Raises:
            NotAsked: at once, after a silence, until Redis answers again.
            StoreUnavailable: an error in place of an answer, or none in time; it may have been heard all the same.
        """
        if self._silent is not None:
            raise StoreUnavailableNow(self._silent)
        question = PendingCall(self._digests[script], key, arguments, asyncio.get_running_loop().create_future())
        self._waiting.append(question)
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask_all(), name="uniroute-limits-asking")
        return question.answer

    async def close(self) -> None:
        await cancel_and_wait(self._asking, self._listening)
        self._fail_all(self._waiting, StoreUnavailableNow(_ENDED))

    async def _ask_all(self) -> None:
        while self._waiting:
            asked = [self._waiting.popleft() for _ in range(min(MAX_BATCH_SIZE, len(self._waiting)))]
            try:
                for question, answer in zip(asked, await self._in_time(asked), strict=True):
                    _tell(question, answer)
            except StoreUnavailable as error:
                self._mark_unavailable(error, asked)
            finally:
                self._fail_all(asked, StoreUnavailable(_ENDED))  # whatever happened, nobody waits for ever

    async def _in_time(self, questions: list[PendingCall]) -> list[Any]:
        asking = asyncio.create_task(self._send(questions))
        try:
            for _ in range(max(1, round(self._timeout_s / SLICE_S))):
                await asyncio.wait({asking}, timeout=SLICE_S)
                if asking.done():
                    if not _timed_out(asking):
                        return asking.result()
                    asking = asyncio.create_task(self._send(questions))  # this process was too busy to see an answer
        finally:
            if not asking.done():
                asking.add_done_callback(_forget)
                asking.cancel()
        waited = f"{self._timeout_s * 1000:.0f} ms"
        raise StoreUnavailable(f"could not {_WHAT}: Redis at {self._store.name} did not answer within {waited}")

    async def _send(self, questions: list[PendingCall]) -> list[Any]:
        """In one round trip; in a few where Redis does not know a script yet."""
        async with self._store.asking(_WHAT) as client:
            answers = await pipeline(client, [_command(question) for question in questions])
            if not any(isinstance(answer, NoScriptError) for answer in answers):
                return answers
            for script in self._digests:
                await client.script_load(script)
        return await self._send(questions)

    def _mark_unavailable(self, error: StoreUnavailable, questions: list[PendingCall]) -> None:
        self._silent = str(error)
        self._fail_all(questions, error)
        self._fail_all(self._waiting, StoreUnavailableNow(str(error)))
        self._waiting.clear()
        self._listening = asyncio.create_task(self._listen(), name="uniroute-limits-listening")

    def _fail_all(self, questions: Iterable[PendingCall], error: StoreUnavailable) -> None:
        for question in questions:
            _fail(question, error)

    async def _listen(self) -> None:
        """Until Redis answers again, and in time, so that no request has to find out."""
        loop = asyncio.get_running_loop()
        while self._silent is not None:
            asked = loop.time()
            if await self._store.available() and loop.time() - asked <= self._timeout_s:
                self._silent = None
            else:
                await asyncio.sleep(PAUSE_S)


def _command(question: PendingCall) -> bytes:
    return encode_command(("EVALSHA", question.script, "1", question.key, *map(str, question.arguments)))


def _tell(question: PendingCall, answer: Any) -> None:
    if isinstance(answer, RedisError):
        error = StoreUnavailable(f"could not {_WHAT}: Redis says {answer}")
        error.__cause__ = answer
        _fail(question, error)
    else:
        question.answer.set_result(answer)


def _fail(question: PendingCall, error: StoreUnavailable) -> None:
    if not question.answer.done():
        question.answer.set_exception(error)


def _timed_out(asking: asyncio.Task[Any]) -> bool:
    error = asking.exception()
    return error is not None and isinstance(error.__cause__, (TimeoutError, RanOut))


def _forget(asking: asyncio.Task[Any]) -> None:
    _ = asking.cancelled() or asking.exception()  # looked at, so that asyncio does not log it as forgotten
