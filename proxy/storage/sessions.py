"""Which model gave which answers: bounded in the process, shared and expiring in Redis. Who stays is routing's.

What it holds are digests, scoped to a client key, never an id or a text that a caller sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from redis.exceptions import RedisError

from proxy.concurrency import cancel_and_wait
from proxy.settings.models import check_model_name
from proxy.storage.complaints import Complaints
from proxy.storage.redis import Store, StoreUnavailable, json_object, unix_time, whole_number

log = logging.getLogger("uniroute.conversations")

PREFIX: Final = "uniroute:conversation"

ASK_S = 0.04
"""How long a request waits for Redis, once."""

RETRY_INTERVAL_S = 1.0
"""After Redis did not answer, one request in so many seconds asks it again."""

MAX_LOCAL = 4_096

MAX_QUEUED = 20_000

BATCH = 500

SETTLE_S = 0.01
"""Between two writes: what comes meanwhile is written together."""

RETRY_S = 1.0

_FUTURE_S = 60.0
"""How far the clocks of two machines may lie apart."""


@dataclass(frozen=True, slots=True)
class LastTurn:
    """The newest answer within a session."""

    model: str
    tokens: int | None
    """Prompt and answer together; None: not reported."""
    age_s: float


@dataclass(frozen=True, slots=True)
class Lookup:
    producer: str | None = None
    """Who gave the tool calls or the reasoning that were asked about."""
    last: LastTurn | None = None


@dataclass(frozen=True, slots=True)
class _Answer:
    model: str
    tokens: int | None
    at: float
    """Unix seconds."""


def scoped_key(key_id: str, mark: str) -> str:
    """What a mark or a session id is remembered under: of another client key, it is another one."""
    return hashlib.sha256(f"{key_id}\0{mark}".encode("utf-8", "surrogatepass")).hexdigest()


class SessionStore:
    """`remember` never waits; `recall` asks Redis only for what this process cannot know. Neither fails."""

    def __init__(
        self,
        store: Store,
        ttl_s: int,
        *,
        clock: Callable[[], float] = time.time,
        on_missed: Callable[[], None] = lambda: None,
        on_dropped: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._ttl_s = ttl_s
        self._clock = clock
        self._on_missed = on_missed
        self._on_dropped = on_dropped
        self._complaints = Complaints(log, "a remembered answer is ignored")
        self._local: OrderedDict[str, _Answer] = OrderedDict()
        self._queue: deque[tuple[str, _Answer]] = deque()
        self._queued = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None
        self._answers = True
        self._ask_after = 0.0

    def remember(self, digests: Sequence[str], model: str, tokens: int | None = None) -> None:
        answer = _Answer(model, tokens, self._clock())
        for digest in digests:
            self._keep(digest, answer)
            if len(self._queue) >= MAX_QUEUED:
                self._queue.popleft()
                self._on_dropped()
            self._queue.append((digest, answer))
        if digests:
            self._queued.set()

    async def recall(self, facts: Sequence[str], session: str | None) -> Lookup:
        """The producer of the first of `facts` that is known, else the last turn of `session`; one round trip at most.

        Who produced something does not change, so this process's own memory will do. A session moves on elsewhere.
        """
        for digest in facts:
            if (known := self._known(digest)) is not None:
                return Lookup(known.model)
        wanted = [*facts, *([] if session is None else [session])]
        if not wanted:
            return Lookup()
        found = await self._ask(wanted)
        for digest in facts:
            if digest in found:
                self._keep(digest, found[digest])
                return Lookup(found[digest].model)
        return Lookup(last=self._last_turn(session, found))

    def start(self) -> None:
        self._writing = asyncio.create_task(self._write_on(), name="uniroute-conversations")

    async def stop(self) -> None:
        """Writes what is queued, if Redis takes it."""
        await cancel_and_wait(self._writing)
        try:
            while self._queue:
                await self.flush()
        except StoreUnavailable as error:
            log.warning("%d conversations are not remembered: %s", len(self._queue), error)

    async def flush(self) -> None:
        """One batch. Raises StoreUnavailable; the batch then stays queued."""
        batch = [self._queue[place] for place in range(min(BATCH, len(self._queue)))]
        if not batch:
            return
        async with self._store.asking("remember conversations") as client, client.pipeline(transaction=False) as pipe:
            for digest, answer in batch:
                pipe.set(_key(digest), _stored(answer), ex=self._ttl_s)
            replies = await pipe.execute(raise_on_error=False)
        if broken := [reply for reply in replies if isinstance(reply, RedisError)]:
            log.warning("%d of %d conversations are not remembered: %s", len(broken), len(replies), broken[0])
        for entry in batch:
            if self._queue and self._queue[0] is entry:
                self._queue.popleft()

    async def _write_on(self) -> None:
        while True:
            await self._queued.wait()
            self._queued.clear()
            try:
                while self._queue:
                    await self.flush()
                    await asyncio.sleep(SETTLE_S)
            except StoreUnavailable as error:
                log.debug("conversations wait: %s", error)
                self._queued.set()
                await asyncio.sleep(RETRY_S)

    def _keep(self, digest: str, answer: _Answer) -> None:
        self._local[digest] = answer
        self._local.move_to_end(digest)
        if len(self._local) > MAX_LOCAL:
            self._local.popitem(last=False)

    def _known(self, digest: str) -> _Answer | None:
        answer = self._local.get(digest)
        if answer is None or self._is_current(answer):
            return answer
        del self._local[digest]
        return None

    def _is_current(self, answer: _Answer) -> bool:
        return -_FUTURE_S <= self._clock() - answer.at <= self._ttl_s

    def _last_turn(self, session: str | None, found: dict[str, _Answer]) -> LastTurn | None:
        """What is newer: Redis may have heard of later turns, or not yet of our own."""
        if session is None:
            return None
        answers = [answer for answer in (self._known(session), found.get(session)) if answer is not None]
        if not answers:
            return None
        newest = max(answers, key=lambda answer: answer.at)
        return LastTurn(newest.model, newest.tokens, max(self._clock() - newest.at, 0.0))

    async def _ask(self, digests: Sequence[str]) -> dict[str, _Answer]:
        """What Redis knows of them, within ASK_S; nothing while it does not answer."""
        now = time.monotonic()
        if now < self._ask_after:
            return {}
        if not self._answers:
            self._ask_after = now + RETRY_INTERVAL_S
        try:
            async with asyncio.timeout(ASK_S), self._store.asking("recall a conversation") as client:
                texts: Any = await client.mget([_key(digest) for digest in digests])
        except (StoreUnavailable, TimeoutError) as error:
            self._missed(f"Redis did not answer within {ASK_S * 1000:g} ms {error}".strip())
            return {}
        self._answers, self._ask_after = True, 0.0
        read = {digest: self._read(text) for digest, text in zip(digests, texts, strict=True)}
        return {digest: answer for digest, answer in read.items() if answer is not None}

    def _missed(self, why: str) -> None:
        if self._answers:
            log.warning("conversations are not recalled until it does: %s", why)
        self._answers, self._ask_after = False, time.monotonic() + RETRY_INTERVAL_S
        self._on_missed()

    def _read(self, text: str | None) -> _Answer | None:
        if text is None:
            return None
        answer = _parsed(text)
        if answer is None:
            self._complaints.make(PREFIX, "is not what we write")
            self._on_missed()
            return None
        return answer if self._is_current(answer) else None


def _key(digest: str) -> str:
    return f"{PREFIX}:{digest}"


def _stored(answer: _Answer) -> str:
    return json.dumps({"model": answer.model, "tokens": answer.tokens, "at": answer.at})


def _parsed(text: str) -> _Answer | None:
    """None where it is not what we write."""
    try:
        stored = json_object(text)
        model = check_model_name(stored.get("model", ""))
        return _Answer(model, whole_number(stored.get("tokens")), unix_time(stored.get("at")))
    except ValueError:  # InvalidRecord is one
        return None
