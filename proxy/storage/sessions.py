"""Which model gave which answers: bounded in the process, shared and expiring in Redis.

It holds digests, scoped to a client key, and never an id or a text that a caller sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from redis.exceptions import RedisError

from proxy.concurrency import LRU, BackgroundTasks
from proxy.settings.model_config import check_model_name
from proxy.storage.command_batcher import CommandBatcher, StoreUnavailableNow
from proxy.storage.records import WarnOnce, json_object, unix_time, whole_number
from proxy.storage.redis import Availability, Store, StoreUnavailable, encode_command, pipeline

log = logging.getLogger("uniroute.conversations")

PREFIX: Final = "uniroute:conversation"

# How long a request waits for Redis, once.
LOOKUP_TIMEOUT_S = 0.04

# Between two attempts to write, while Redis does not answer.
RETRY_INTERVAL_S = 1.0

MAX_LOCAL = 4_096

MAX_QUEUED = 20_000

BATCH_SIZE = 500

# Between two writes. What comes meanwhile is written together.
WRITE_INTERVAL_S = 0.01

# How far the clocks of two machines may lie apart.
MAX_CLOCK_SKEW_S = 60.0


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
    """The model that gave the tool calls or the reasoning."""
    last: LastTurn | None = None
    makers: Mapping[str, str] = field(default_factory=dict)
    """Fingerprint of an earlier turn → the model that gave it, where that is known."""


@dataclass(frozen=True, slots=True)
class _Answer:
    model: str
    tokens: int | None
    at: float
    """Unix seconds."""


def scoped_key(key_id: str, fingerprint: str) -> str:
    """Return the digest under which a fingerprint or a session id of a client key is stored."""
    return hashlib.sha256(f"{key_id}\0{fingerprint}".encode("utf-8", "surrogatepass")).hexdigest()


class SessionStore:
    """Remember who answered. `record` never waits, and `lookup` asks Redis only for what this process cannot know.

    Neither fails: without Redis, what this process knows is all there is.
    """

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
        self._warn_once = WarnOnce(log, "a remembered answer is ignored")
        self._local: LRU[str, _Answer] = LRU(MAX_LOCAL)
        self._queue: deque[tuple[str, _Answer]] = deque()
        self._queued = asyncio.Event()
        self._lookups = CommandBatcher(store, "recall a conversation", LOOKUP_TIMEOUT_S)
        self._availability = Availability(log)
        self._tasks = BackgroundTasks()

    def record(self, digests: Sequence[str], model: str, tokens: int | None = None) -> None:
        """Note that `model` gave the answer with these fingerprints, or the last answer of this session."""
        answer = _Answer(model, tokens, self._clock())
        for digest in digests:
            self._local[digest] = answer
            if len(self._queue) >= MAX_QUEUED:
                self._queue.popleft()
                self._on_dropped()
            self._queue.append((digest, answer))
        if digests:
            self._queued.set()

    async def lookup(self, fingerprints: Sequence[str], session: str | None, earlier: Sequence[str] = ()) -> Lookup:
        """Return the producer of the first known fingerprint, else the last turn of `session`; in one round trip.

        The producer of an answer does not change, so this process's own memory will do. A session may have continued
        in another process.

        Args:
            earlier: fingerprints of turns whose makers are wanted too, if they are known or a round trip is made.
        """
        makers = {digest: known.model for digest in earlier if (known := self._known(digest)) is not None}
        for digest in fingerprints:
            if (known := self._known(digest)) is not None:
                return Lookup(known.model, makers=makers)
        unknown = [digest for digest in earlier if digest not in makers]
        wanted = [*fingerprints, *unknown, *([] if session is None else [session])]
        if not wanted:
            return Lookup(makers=makers)
        found = await self._fetch(wanted)
        for digest in unknown:
            if digest in found:
                self._local[digest] = found[digest]
                makers[digest] = found[digest].model
        for digest in fingerprints:
            if digest in found:
                self._local[digest] = found[digest]
                return Lookup(found[digest].model, makers=makers)
        return Lookup(last=self._last_turn(session, found), makers=makers)

    def start(self) -> None:
        self._tasks.start("uniroute-conversations", self._write_loop)

    async def stop(self) -> None:
        """Write what is queued, if Redis takes it."""
        await self._lookups.close()
        await self._tasks.close()
        try:
            while self._queue:
                await self.flush()
        except StoreUnavailable as error:
            log.warning("%d conversations are not remembered: %s", len(self._queue), error)

    async def flush(self) -> None:
        """Write one batch. Raise StoreUnavailable; the batch then stays queued."""
        batch = [self._queue[place] for place in range(min(BATCH_SIZE, len(self._queue)))]
        if not batch:
            return
        lifetime = str(self._ttl_s)
        commands = [encode_command(("SET", _key(digest), _to_json(answer), "EX", lifetime)) for digest, answer in batch]
        async with self._store.operation("remember conversations") as client:
            replies = await pipeline(client, commands)
        if broken := [reply for reply in replies if isinstance(reply, RedisError)]:
            log.warning("%d of %d conversations are not remembered: %s", len(broken), len(replies), broken[0])
        for entry in batch:
            if self._queue and self._queue[0] is entry:
                self._queue.popleft()

    async def _write_loop(self) -> None:
        while True:
            await self._queued.wait()
            self._queued.clear()
            try:
                while self._queue:
                    await self.flush()
                    await asyncio.sleep(WRITE_INTERVAL_S)
            except StoreUnavailable as error:
                log.debug("conversations wait: %s", error)
                self._queued.set()
                await asyncio.sleep(RETRY_INTERVAL_S)

    def _known(self, digest: str) -> _Answer | None:
        answer = self._local.get(digest)
        if answer is None or self._is_current(answer):
            return answer
        del self._local[digest]
        return None

    def _is_current(self, answer: _Answer) -> bool:
        return -MAX_CLOCK_SKEW_S <= self._clock() - answer.at <= self._ttl_s

    def _last_turn(self, session: str | None, found: dict[str, _Answer]) -> LastTurn | None:
        """Return the newer of two: Redis may have heard of later turns, or not yet of our own."""
        if session is None:
            return None
        answers = [answer for answer in (self._known(session), found.get(session)) if answer is not None]
        if not answers:
            return None
        newest = max(answers, key=lambda answer: answer.at)
        return LastTurn(newest.model, newest.tokens, max(self._clock() - newest.at, 0.0))

    async def _fetch(self, digests: Sequence[str]) -> dict[str, _Answer]:
        """Return what Redis knows of them; nothing if it does not answer within LOOKUP_TIMEOUT_S."""
        try:
            texts: Any = await self._lookups.call(("MGET", *map(_key, digests)))
        except StoreUnavailableNow:
            return {}
        except StoreUnavailable as error:
            self._availability.mark_unavailable(f"conversations are not recalled until it does: {error}")
            self._on_missed()
            return {}
        self._availability.mark_available()
        read = {digest: self._read(text) for digest, text in zip(digests, texts, strict=True)}
        return {digest: answer for digest, answer in read.items() if answer is not None}

    def _read(self, text: str | None) -> _Answer | None:
        if text is None:
            return None
        answer = _from_json(text)
        if answer is None:
            self._warn_once(PREFIX, "is not what we write")
            self._on_missed()
            return None
        return answer if self._is_current(answer) else None


def _key(digest: str) -> str:
    return f"{PREFIX}:{digest}"


def _to_json(answer: _Answer) -> str:
    return json.dumps({"model": answer.model, "tokens": answer.tokens, "at": answer.at})


def _from_json(text: str) -> _Answer | None:
    """Parse a stored answer; return None if we would not have written it."""
    try:
        stored = json_object(text)
        model = check_model_name(stored.get("model", ""))
        return _Answer(model, whole_number(stored.get("tokens")), unix_time(stored.get("at")))
    except ValueError:  # InvalidRecord is one
        return None
