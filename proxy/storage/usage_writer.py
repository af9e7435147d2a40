from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

from proxy.concurrency import cancel_and_wait
from proxy.storage.redis import Store, StoreUnavailable, load_script
from proxy.storage.usage import UsageRecord
from proxy.storage.usage_journal import Batch, Journal, JournalDirectory

STREAM: Final = "uniroute:usage"

JOURNALS: Final = "uniroute:usage:journals"
"""Hash: journal id → number of the last record applied, or `done:` and when it was."""

MAX_ENTRIES = 100_000

REFUSED = -1

NO_SETTLING = """
local function settle(key_id, reservation_id, tokens, picousd, day, month)
end
"""
"""What a client key's record does to its limits. All arguments are texts: amounts can be larger than what a Lua number
holds exactly, and where one is unknown it is ''. Whatever it raises is counted, and holds nothing up."""

_APPLY = load_script(__package__, "apply_usage", REFUSED=REFUSED)

FINISH = load_script(__package__, "finish_journal")

FINISHED_KEPT_S = 3600


def apply_script(settle_function: str = NO_SETTLING) -> str:
    """`settle_function`: Lua text of a local function `settle` with the parameters of NO_SETTLING's."""
    return settle_function + _APPLY


TOTALS: Final = "uniroute:usage:totals"
"""With `:<model>`, the hash of what a model used."""

KEY_TOTALS: Final = "uniroute:usage:key"
"""With `:<id>`, the hash of what a client key used."""

COUNTED = ("prompt_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")

COUNTED_SINCE = ("cache_write_tokens", "audio_input_tokens", "audio_output_tokens")
"""Not in records that an earlier version wrote."""

DAY_S = 86_400

MAX_COUNT = 10**18
"""A sum in Redis has 63 bits. What a single request cannot have used is taken as unknown, not as the end of the sum."""

Word = str | int | float


@dataclass
class BatchTotals:
    """Of one batch."""

    texts: list[str] = field(default_factory=list)
    sums: defaultdict[tuple[str, str], int | float] = field(default_factory=lambda: defaultdict(int))
    """Hash and field → how much more."""
    settlements: list[list[str]] = field(default_factory=list)
    """Key, reservation, tokens, picodollars, day and month (UTC) of each record of a client key, as texts."""

    def add(self, text: str, record: Mapping[str, Any]) -> None:
        """Raises ValueError: it is not a record that we wrote, and nothing was added."""
        try:
            amounts = _amounts(record)
            model, key_id, reservation = record["model"], record["key_id"], record["reservation"] or ""
            day = _day(int(record["at"] // DAY_S))
        except (KeyError, TypeError, OverflowError, OSError) as error:
            raise ValueError(f"not a usage record: {type(error).__name__} {error}") from error
        self.texts.append(text)
        self._count(f"{TOTALS}:{model}", amounts)
        if key_id:
            self._count(f"{KEY_TOTALS}:{key_id}", amounts)
            cost = str(amounts.get("cost_picousd", ""))
            self.settlements.append([str(key_id), str(reservation), _tokens(record), cost, day, day[:7]])

    def words(self) -> list[Word]:
        """As the script reads it."""
        words: list[Word] = [len(self.texts), *self.texts, len(self.sums)]
        for (key, name), amount in self.sums.items():
            words += [key, name, repr(amount)]
        return [*words, *(word for settlement in self.settlements for word in settlement)]

    def _count(self, key: str, amounts: Mapping[str, int | float]) -> None:
        for name, amount in amounts.items():
            self.sums[key, name] += amount


@lru_cache(maxsize=8)
def _day(number: int) -> str:
    """UTC, of the day that is so many after the first of Unix time."""
    return datetime.fromtimestamp(number * DAY_S, UTC).strftime("%Y-%m-%d")


def _amounts(record: Mapping[str, Any]) -> dict[str, int | float]:
    amounts: dict[str, int | float] = {"requests": 1, str(record["ending"]): 1}
    amounts |= {name: int(record[name]) for name in COUNTED if record[name]}
    amounts |= {name: int(record[name]) for name in COUNTED_SINCE if record.get(name)}
    cost = record["cost_picousd"]
    if cost is None or not 0 <= cost <= MAX_COUNT:
        return {**amounts, "cost_unknown": 1}
    return {**amounts, "cost_picousd": int(cost), "cost_usd": float(record["cost_usd"])}


def _tokens(record: Mapping[str, Any]) -> str:
    prompt, output = record["prompt_tokens"], record["output_tokens"]
    return "" if prompt is None or output is None else str(prompt + output)


log = logging.getLogger("uniroute.usage")

BATCH = 200

BATCH_SIZE = 40
"""Records that are added up before requests get a turn."""

FLUSH_S = 0.5

RETRY_S = 1.0

ADOPT_S = 5.0


class UsageWriter:
    """What is recorded is in a file at once, and in Redis soon: once, also when it was sent twice."""

    def __init__(
        self,
        store: Store,
        journals: JournalDirectory,
        on_dropped: Callable[[], None] = lambda: None,
        *,
        settle_function: str = NO_SETTLING,
    ) -> None:
        self._store = store
        self._journals = journals
        self._on_dropped = on_dropped
        self._apply = store.client.register_script(apply_script(settle_function))
        self._finish = store.client.register_script(FINISH)
        self._finished: list[str] = []
        self._away = False
        self._writing: asyncio.Task[None] | None = None

    @property
    def journal_bytes(self) -> int:
        """Of the files; what has reached Redis may be among it."""
        return self._journals.bytes

    def record(self, entry: UsageRecord) -> None:
        if not self._journals.append(entry.to_json()):
            self._drop(1)

    def start(self) -> None:
        self._writing = asyncio.create_task(self._write_on(), name="uniroute-usage")

    async def stop(self) -> None:
        """Brings to Redis what it takes; the rest stays in the journals for the next start."""
        await cancel_and_wait(self._writing)
        try:
            await self.flush()
            for journal in self._journals.all:
                if journal.size and journal.through:
                    self._remove(journal)
            await self._finish_removed()
        except StoreUnavailable as error:
            log.warning("usage stays in its journals for the next start: %s", error)
        if lost := self._journals.close():
            log.error("%d usage records are lost: neither the store nor the disk took them", lost)
            self._drop(lost)

    async def flush(self) -> None:
        """All that is there. Raises StoreUnavailable; nothing of it is lost then, and nothing counted twice."""
        for journal in self._journals.all:
            while await self._applied(journal):
                pass
            if not self._journals.is_open(journal):
                self._remove(journal)
        await self._finish_removed()

    async def _applied(self, journal: Journal) -> bool:
        """One batch. False: there was none."""
        batch = _next_of(journal)
        tally, broken = await _totals_of(batch)
        if batch.entries:
            applied, uncounted = await self._send(journal, batch, tally)
            if uncounted == REFUSED:
                self._resync(journal, applied)
                return True
            if uncounted:
                log.warning("%d usage figures of %d records were not counted", uncounted, len(batch.entries))
        journal.mark(batch)
        if broken:
            log.error("%d lines of the usage journal %s cannot be read and are left out", broken, journal.path)
            self._drop(broken)
        return bool(batch.entries)

    async def _send(self, journal: Journal, batch: Batch, tally: BatchTotals) -> tuple[int, int]:
        first, last = batch.entries[0].number, batch.entries[-1].number
        arguments = [journal.id, journal.applied, first, last, MAX_ENTRIES, *tally.words()]
        async with self._store.asking("record usage"):
            applied, uncounted = await self._apply(keys=[JOURNALS, STREAM], args=arguments)
        return int(applied), int(uncounted)

    def _resync(self, journal: Journal, applied: int) -> None:
        """The store says what it has: more than we heard of, since a reply was lost, or less, since it went back."""
        if applied < journal.applied:
            log.warning("the store went back: usage after record %d of %s is sent again", applied, journal.path)
            journal.rewind(applied)
        else:
            journal.applied = applied

    def _remove(self, journal: Journal) -> None:
        """First the file, then its number in Redis: without the number it would be applied again."""
        try:
            self._journals.remove(journal)
        except OSError as error:
            raise StoreUnavailable(f"could not remove the usage journal {journal.path}: {error}") from error
        self._finished.append(journal.id)

    async def _finish_removed(self) -> None:
        while self._finished:
            async with self._store.asking("record usage"):
                await self._finish(keys=[JOURNALS], args=[self._finished[-1], FINISHED_KEPT_S])
            self._finished.pop()

    def _drop(self, records: int) -> None:
        for _ in range(records):
            self._on_dropped()

    async def _write_on(self) -> None:
        loop = asyncio.get_running_loop()
        adopted = -ADOPT_S
        while True:
            if loop.time() - adopted >= ADOPT_S:
                adopted = loop.time()
                self._journals.adopt()
            self._journals.write_waiting()
            try:
                await self.flush()
                self._back()
                await asyncio.sleep(FLUSH_S)
            except StoreUnavailable as error:
                self._wait(error)
                await asyncio.sleep(RETRY_S)

    def _wait(self, error: StoreUnavailable) -> None:
        if not self._away:
            log.warning("usage waits in its journals: %s", error)
        self._away = True

    def _back(self) -> None:
        if self._away:
            log.info("usage reaches the store again")
        self._away = False


def _next_of(journal: Journal) -> Batch:
    try:
        return journal.read(BATCH)
    except OSError as error:
        raise StoreUnavailable(f"could not record usage: {journal.path} cannot be read: {error}") from error


async def _totals_of(batch: Batch) -> tuple[BatchTotals, int]:
    """And how many lines are no records of ours. Requests get a turn meanwhile."""
    tally, broken = BatchTotals(), batch.broken
    for place, entry in enumerate(batch.entries):
        if place % BATCH_SIZE == 0:
            await asyncio.sleep(0)
        try:
            tally.add(entry.text, entry.fields)
        except ValueError:
            broken += 1
    return tally, broken
