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
from proxy.storage.redis import Store, StoreUnavailable, encode_command, pipeline
from proxy.storage.snapshot import RoutingSnapshot
from proxy.upstream.key_scope import address_of
from router_core.pricing import max_price_usd, picousd
from router_core.types import Doubles, Price

PREFIX: Final = "uniroute:limits:"

DAY_KEPT_S = 8 * 86_400

MONTH_KEPT_S = 62 * 86_400
"""After the last cost of that period."""

# What is used of a bucket, as it leaks, nothing being a full one; and whether an amount may still be taken. The same as
# in bucket.
BUCKET: Final = """
local function limits_leaked(used, at, per_minute, now)
  return math.max(0, used - math.max(0, now - at) * per_minute / 60)
end
local function limits_has(used, per_minute, amount) return used + amount <= per_minute end
"""

# The Gregorian date of Unix seconds, in UTC: Howard Hinnant's civil_from_days.
DATE: Final = """
local function limits_date(now)
  local days = math.floor(now / 86400) + 719468
  local era = math.floor(days / 146097)
  local day = days - era * 146097
  local leaps = math.floor(day / 1460) - math.floor(day / 36524) + math.floor(day / 146096)
  local year = math.floor((day - leaps) / 365)
  day = day - (365 * year + math.floor(year / 4) - math.floor(year / 100))
  local month = math.floor((5 * day + 2) / 153)
  day = day - math.floor((153 * month + 2) / 5) + 1
  month = month < 10 and month + 3 or month - 9
  return string.format('%04d-%02d-%02d', year + era * 400 + (month <= 2 and 1 or 0), month, day)
end
"""

_SHARED = f"""{BUCKET}
local function limits_root(key_id) return '{PREFIX}{{' .. key_id .. '}}:' end
local function limits_now()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1000000
end
local function limits_keep(root, seconds)
  for _, name in ipairs({{'state', 'held', 'open'}}) do
    if redis.call('TTL', root .. name) < seconds then redis.call('EXPIRE', root .. name, seconds) end
  end
end
local function limits_fill_s(used, per_minute)
  return per_minute > 0 and math.min(86400, math.ceil(used * 60 / per_minute)) or 0
end
local function limits_is_count(text) return string.match(text, '^%d+$') and #text <= 19 end
local function limits_number(text)
  local number = tonumber(text or '0')
  return number and number >= 0 and number < 1e15 and number
end
local function limits_read(held) return string.match(held or '', '^([^:]*):(%d+):([^:]*):?(.*)$') end
local function limits_held(root, reservation) return limits_read(redis.call('HGET', root .. 'held', reservation)) end
local function limits_recount(root)
  local sums = {{reserved = 0, ended = 0}}
  for _, held in ipairs(redis.call('HVALS', root .. 'held')) do
    local _, picousd, _, ended = limits_read(held)
    local sum = ended == 'ended' and 'ended' or 'reserved'
    sums[sum] = sums[sum] + (limits_number(picousd) or 0)
  end
  local reserved, ended = string.format('%.0f', sums.reserved), string.format('%.0f', sums.ended)
  redis.call('HSET', root .. 'state', 'reserved', reserved, 'ended', ended)
  return reserved, ended
end
local function limits_add(root, sum, picousd)
  if picousd == '0' or picousd == '-0' then return end
  local left = redis.pcall('HINCRBY', root .. 'state', sum, picousd)
  if type(left) == 'table' or left < 0 then limits_recount(root) end
end
local function limits_release(root, reservation)
  local _, picousd, _, ended = limits_held(root, reservation)
  redis.call('HDEL', root .. 'held', reservation)
  redis.call('ZREM', root .. 'open', reservation)
  limits_add(root, ended == 'ended' and 'ended' or 'reserved', '-' .. (picousd or '0'))
end
local function limits_correct(root, held_tokens, tokens)
  local used, at, limit = unpack(redis.call('HMGET', root .. 'state', 'tokens', 'tokens_at', 'tokens_limit'))
  used, at, limit = used and limits_number(used), at and limits_number(at), limit and limits_number(limit)
  if tokens == '' or tokens == held_tokens or not (used and at and limit and limits_number(held_tokens)) then return end
  local now = limits_now()
  used = math.max(0, limits_leaked(used, at, limit, now) + tonumber(tokens) - tonumber(held_tokens))
  redis.call('HSET', root .. 'state', 'tokens', string.format('%.17g', used), 'tokens_at', string.format('%.6f', now))
  limits_keep(root, limits_fill_s(used, limit) + 60)
end
"""

# All arguments are texts. `tokens` and `picousd` may be '': not known, and then what was reserved is what was used.
# `reservation` may be '': there was none, and the cost alone is counted, in `day` and `month`. A reservation's cost
# belongs to the day that it was made on, by Redis' clock, whatever the clock of the caller says.
# Of a reservation that is not there any more nothing is given back, so that giving back twice is once.
SETTLE_FUNCTION: Final = f"""{_SHARED}
local function settle(key_id, reservation, tokens, picousd, day, month)
  local root = limits_root(key_id)
  local held_tokens, held_picousd, held_day
  if reservation ~= '' then held_tokens, held_picousd, held_day = limits_held(root, reservation) end
  if held_day then day, month = held_day, string.sub(held_day, 1, 7) end
  if picousd == '' then picousd = held_picousd or '0' end
  local uncounted
  if picousd ~= '0' then
    local periods = {{{{'day:' .. day, {DAY_KEPT_S}}}, {{'month:' .. month, {MONTH_KEPT_S}}}}}
    for _, period in ipairs(periods) do
      local spent = redis.pcall('INCRBY', root .. period[1], picousd)
      uncounted = uncounted or (type(spent) == 'table' and spent.err)
      redis.call('EXPIRE', root .. period[1], period[2])
    end
  end
  if reservation ~= '' then limits_release(root, reservation) end
  if held_day then limits_correct(root, held_tokens, tokens) end
  if uncounted then error(uncounted) end
  if not held_day then return 0 end
  return 1
end
"""

# ARGV: the arguments of settle. KEYS[1]: the key's state, for a cluster to know where.
SETTLE: Final = f"{SETTLE_FUNCTION} return settle(unpack(ARGV))"

# What a request took takes the place of what was reserved for it, before its usage record comes with the next batch.
# KEYS[1]: the key's state. ARGV: key id, reservation, tokens and picodollars, '' where not known. Again is harmless.
END: Final = f"""{_SHARED}
local key_id, reservation, tokens, picousd = unpack(ARGV)
local root = limits_root(key_id)
local held_tokens, held_picousd, day, ended = limits_held(root, reservation)
if ended ~= '' then return 0 end
if tokens == '' then tokens = held_tokens end
if picousd == '' then picousd = held_picousd end
redis.call('HSET', root .. 'held', reservation, tokens .. ':' .. picousd .. ':' .. day .. ':ended')
limits_add(root, 'reserved', '-' .. held_picousd)
limits_add(root, 'ended', picousd)
limits_correct(root, held_tokens, tokens)
return 1
"""

# KEYS[1]: the key's state. ARGV: key id, reservation, seconds until it ends by itself, tokens, picodollars, then the
# limits, '' where there is none: requests a minute, tokens a minute, picodollars a day, a month.
# Returns what stands against it, or 'granted'; then what is used with it: requests, tokens, picodollars of the day, of
# the month, reserved and ended, and Redis' time; as one text of eight words: a list takes three times as long to read.
# What is refused uses nothing, and what costs nothing is within any budget.
# Asked again, a granted one is granted.
RESERVE: Final = f"""{_SHARED}{DATE}
local key_id, reservation, lives = ARGV[1], ARGV[2], tonumber(ARGV[3])
local picousd = ARGV[5]
local amounts = {{requests = 1, tokens = tonumber(ARGV[4])}}
local rates = {{requests = tonumber(ARGV[6]), tokens = tonumber(ARGV[7])}}
local budgets = {{day = tonumber(ARGV[8]), month = tonumber(ARGV[9])}}
local root, now = limits_root(key_id), limits_now()
for _, ended in ipairs(redis.call('ZRANGEBYSCORE', root .. 'open', '-inf', now, 'LIMIT', 0, 1000)) do
  limits_release(root, ended)
end
local today = limits_date(now)
local spent = {{
  day = redis.call('GET', root .. 'day:' .. today) or '0',
  month = redis.call('GET', root .. 'month:' .. string.sub(today, 1, 7)) or '0',
}}
for _, period in ipairs({{'day', 'month'}}) do
  if not limits_is_count(spent[period]) then
    if budgets.day or budgets.month then
      return redis.error_reply(root .. period .. ':* holds no count of picodollars; set it to a whole number')
    end
    spent[period] = '0'
  end
end
local reserved, ended = unpack(redis.call('HMGET', root .. 'state', 'reserved', 'ended'))
reserved, ended = reserved or '0', ended or '0'
if not (limits_is_count(reserved) and limits_is_count(ended)) then reserved, ended = limits_recount(root) end
local used = {{requests = 0, tokens = 0}}
for kind, per_minute in pairs(rates) do
  local level, at = unpack(redis.call('HMGET', root .. 'state', kind, kind .. '_at'))
  level, at = limits_number(level), limits_number(at)
  if not (level and at) or at > now + 60 then  -- none of ours, or of a clock that is far from here: full, as of now
    level, at = per_minute, now
    redis.call('HSET', root .. 'state', kind, level, kind .. '_at', string.format('%.6f', now))
  end
  used[kind] = limits_leaked(level, at, per_minute, now)
end
local function reply(verdict)
  local requests, tokens = string.format('%.17g', used.requests), string.format('%.17g', used.tokens)
  local words = {{verdict, requests, tokens, spent.day, spent.month, reserved, ended, string.format('%.6f', now)}}
  return table.concat(words, ' ')
end
if redis.call('HEXISTS', root .. 'held', reservation) == 1 then return reply('granted') end
for _, period in ipairs({{'day', 'month'}}) do
  local limit = budgets[period]
  local committed = tonumber(spent[period]) + tonumber(reserved) + tonumber(ended) + tonumber(picousd)
  if limit and picousd ~= '0' and committed > limit then return reply(period) end
end
for _, kind in ipairs({{'requests', 'tokens'}}) do
  if rates[kind] and not limits_has(used[kind], rates[kind], amounts[kind]) then return reply(kind) end
end
redis.call('HINCRBY', root .. 'state', 'reserved', picousd)
redis.call('HSET', root .. 'held', reservation, ARGV[4] .. ':' .. picousd .. ':' .. today)
redis.call('ZADD', root .. 'open', string.format('%.6f', now + lives), reservation)
local kept = math.ceil(lives)
for kind, per_minute in pairs(rates) do
  used[kind] = used[kind] + amounts[kind]
  local level, at = string.format('%.17g', used[kind]), string.format('%.6f', now)
  redis.call('HSET', root .. 'state', kind, level, kind .. '_at', at, kind .. '_limit', per_minute)
  kept = math.max(kept, limits_fill_s(used[kind], per_minute))
end
limits_keep(root, kept + 60)
return reply('granted')
"""


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
