from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

from proxy.concurrency import BackgroundTasks
from proxy.storage.decisions import BYTES, DECISIONS, DETAIL, FEEDBACK, TIMES, DecisionBounds
from proxy.storage.redis import Availability, Store, StoreUnavailable, load_script
from proxy.storage.usage import UsageRecord
from proxy.storage.usage_journal import Batch, Journal, JournalDirectory

log = logging.getLogger("uniroute.usage")

# With `:<model>`, the hash of what a model used.
TOTALS: Final = "uniroute:usage:totals"

# With `:<id>`, the hash of what a client key used.
KEY_TOTALS: Final = "uniroute:usage:key"

# With `:<day>`, the hash of what all requests of a day (UTC) used.
DAY_TOTALS: Final = "uniroute:usage:day"

# Days of which it is kept.
MAX_DAYS = 35

# Fields of a record that are summed up.
COUNTED = ("prompt_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")

# Records that an earlier version wrote do not have these.
COUNTED_SINCE = ("cache_write_tokens", "audio_input_tokens", "audio_output_tokens")

DAY_S = 86_400

# A sum in Redis has 63 bits. A cost above this, which no request can have had, counts as unknown.
MAX_COUNT = 10**18

ScriptArgument = str | int | float


async def read_key_totals(store: Store, key_ids: Collection[str]) -> dict[str, dict[str, int]]:
    """Return the sums of what each client key has used ever since, by field. Raise StoreUnavailable."""
    return await _read_totals(store, "read what keys have used", KEY_TOTALS, key_ids)


async def read_day_totals(store: Store, days: Collection[str]) -> dict[str, dict[str, int]]:
    """Return the sums of each of these days that has any, by field. Raise StoreUnavailable."""
    found = await _read_totals(store, "read what was used by day", DAY_TOTALS, days)
    return {day: totals for day, totals in found.items() if totals}


async def _read_totals(store: Store, what: str, prefix: str, names: Collection[str]) -> dict[str, dict[str, int]]:
    async with store.operation(what) as client:
        found: Any = await asyncio.gather(*(client.hgetall(f"{prefix}:{name}") for name in names))
    return {
        name: {field: int(value) for field, value in totals.items() if value.lstrip("-").isdecimal()}
        for name, totals in zip(names, found, strict=True)
    }


@dataclass
class BatchTotals:
    """Add up the records of one batch, for apply_usage.lua.

    Args:
        keep_decisions: whether the details of decisions are kept.
    """

    keep_decisions: bool = False
    texts: list[str] = field(default_factory=list)
    sums: defaultdict[tuple[str, str], int | float] = field(default_factory=lambda: defaultdict(int))
    """(hash, field) → the amount to add."""
    settlements: list[list[str]] = field(default_factory=list)
    """For each record of a client key, as strings: key, reservation, tokens, picodollars, day and month (UTC)."""
    decisions: list[ScriptArgument] = field(default_factory=list)
    """For each decision, its id, the time of its end, and its record."""

    def add(self, text: str, record: Mapping[str, Any]) -> None:
        """Add one record. Raise ValueError, with nothing added, if it is not one that UniRoute writes."""
        try:
            amounts = _amounts(record)
            model, key_id, reservation = record["model"], record["key_id"], record["reservation"] or ""
            day = _day(int(record["at"] // DAY_S))
        except (KeyError, TypeError, OverflowError, OSError) as error:
            raise ValueError(f"not a usage record: {type(error).__name__} {error}") from error
        if DETAIL in record:
            if self.keep_decisions:
                self.decisions += [str(record["decision"]), record["at"], text]
            # No text in the JSON before can hold this: its quotes would be escaped.
            text = text[: text.index(f',"{DETAIL}":')] + "}"
        self.texts.append(text)
        self._count(f"{TOTALS}:{model}", amounts)
        self._count(f"{DAY_TOTALS}:{day}", amounts)
        if key_id:
            self._count(f"{KEY_TOTALS}:{key_id}", amounts)
            cost = str(amounts.get("cost_picousd", ""))
            self.settlements.append([str(key_id), str(reservation), _tokens(record), cost, day, day[:7]])

    def script_args(self) -> list[ScriptArgument]:
        """Return the totals as apply_usage.lua reads them."""
        arguments: list[ScriptArgument] = [len(self.texts), *self.texts, len(self.sums)]
        for (key, name), amount in self.sums.items():
            arguments += [key, name, repr(amount)]
        arguments += [len(self.decisions) // 3, *self.decisions]
        return [*arguments, *(text for settlement in self.settlements for text in settlement)]

    def _count(self, key: str, amounts: Mapping[str, int | float]) -> None:
        for name, amount in amounts.items():
            self.sums[key, name] += amount


@lru_cache(maxsize=8)
def _day(days: int) -> str:
    """Return the date (UTC) that is so many days after 1970-01-01."""
    return datetime.fromtimestamp(days * DAY_S, UTC).strftime("%Y-%m-%d")


def _amounts(record: Mapping[str, Any]) -> dict[str, int | float]:
    """Return what a record adds to the fields of a hash of totals."""
    amounts: dict[str, int | float] = {"requests": 1, str(record["ending"]): 1}
    amounts |= {name: int(record[name]) for name in COUNTED if record[name]}
    amounts |= {name: int(record[name]) for name in COUNTED_SINCE if record.get(name)}
    cost = record["cost_picousd"]
    if cost is None or not 0 <= cost <= MAX_COUNT:
        return {**amounts, "cost_unknown": 1}
    return {**amounts, "cost_picousd": int(cost), "cost_usd": float(record["cost_usd"])}


def _tokens(record: Mapping[str, Any]) -> str:
    """Return all tokens of a record; "" if they are not known."""
    prompt, output = record["prompt_tokens"], record["output_tokens"]
    return "" if prompt is None or output is None else str(prompt + output)


STREAM: Final = "uniroute:usage"

# Entries of the stream, about.
MAX_ENTRIES = 100_000

# Hash: journal id → number of the last record applied, or `done:` and the time at which its file was removed.
JOURNALS: Final = "uniroute:usage:journals"

# Returned for a batch that does not follow the last record applied.
REFUSED = -1

_APPLY = load_script(
    __package__, "apply_usage", REFUSED=REFUSED, DAY_TOTALS=f"{DAY_TOTALS}:", DAYS_KEPT_S=MAX_DAYS * DAY_S
)

# The function that apply_usage.lua calls for each record of a client key, to settle it against the key's limits; this
# one does nothing. All parameters are strings: amounts can be larger than a Lua number holds exactly, and an unknown
# amount is ''. If it fails, the script counts that and goes on.
NO_SETTLING = "local function settle(key_id, reservation_id, tokens, picousd, day, month)\nend\n"

FINISH = load_script(__package__, "finish_journal")

# How long a journal stays marked `done:`, so that a late attempt to apply its last records finds that they are applied.
FINISHED_KEPT_S = 3600

# Records that are sent to the store in one script.
BATCH_SIZE = 200

# Records that are added up before other tasks get a turn.
RECORDS_PER_TURN = 40

FLUSH_INTERVAL_S = 0.5

RETRY_INTERVAL_S = 1.0

CLAIM_INTERVAL_S = 5.0


class UsageWriter:
    """Write usage records to a journal at once and to Redis soon. Redis counts each once, even if it is sent twice."""

    def __init__(
        self,
        store: Store,
        journals: JournalDirectory,
        on_dropped: Callable[[], None] = lambda: None,
        *,
        settle_function: str = NO_SETTLING,
        decisions: DecisionBounds | None = None,
        on_skipped: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            settle_function: Lua text of a local function `settle` with the parameters of NO_SETTLING's.
            decisions: how many decisions are kept, and for how long. None: none.
            on_skipped: is called for each decision that is not recorded because too many came within a second.
            clock: monotonic seconds.
        """
        self._store = store
        self._journals = journals
        self._on_dropped = on_dropped
        self._decisions = decisions
        self._on_skipped = on_skipped
        self._clock = clock
        # Decisions of the current second.
        self._second = 0
        self._recorded = 0
        self._apply = store.client.register_script(settle_function + _APPLY)
        self._finish = store.client.register_script(FINISH)
        # Journals whose file is removed, but not their number in Redis.
        self._finished: list[str] = []
        self._availability = Availability(log, back="usage reaches the store again")
        self._tasks = BackgroundTasks()

    def takes_decision(self) -> bool:
        """Whether one more decision is to be recorded now. Count it, if it is; and if it comes too fast."""
        if self._decisions is None:
            return False
        second = int(self._clock())
        if second != self._second:
            self._second, self._recorded = second, 0
        if self._recorded >= self._decisions.max_per_s:
            self._on_skipped()
            return False
        self._recorded += 1
        return True

    @property
    def journal_bytes(self) -> int:
        """Return the size of the journals, of which a part may be in Redis already."""
        return self._journals.bytes

    def record(self, entry: UsageRecord, detail: str = "") -> None:
        """Write a record to the journal. `detail`: what is kept of the decision beside the usage, a JSON object."""
        text = entry.to_json()
        if detail:
            text = f'{text[:-1]},"{DETAIL}":{detail}}}'
        if not self._journals.append(text):
            self._drop(1)

    def start(self) -> None:
        self._tasks.start("uniroute-usage", self._write_loop)

    async def stop(self) -> None:
        """Write to Redis what it accepts; the rest stays in the journals for the next start."""
        await self._tasks.close()
        try:
            await self.flush()
            for journal in self._journals.all:
                if journal.size and journal.fully_applied:
                    self._remove(journal)
            await self._finish_removed()
        except StoreUnavailable as error:
            log.warning("usage stays in its journals for the next start: %s", error)
        if lost := self._journals.close():
            log.error("%d usage records are lost: neither the store nor the disk took them", lost)
            self._drop(lost)

    async def flush(self) -> None:
        """Write all journals to Redis.

        Raises:
            StoreUnavailable: try again; nothing is lost, and nothing will be counted twice.
        """
        for journal in self._journals.all:
            while await self._apply_batch(journal):
                pass
            if not self._journals.is_open(journal):
                self._remove(journal)
        await self._finish_removed()

    async def _apply_batch(self, journal: Journal) -> bool:
        """Write a journal's next batch to Redis; return False if there was none."""
        batch = _next_batch(journal)
        totals, broken = await _totals_of(batch, keep_decisions=self._decisions is not None)
        if batch.entries:
            applied, uncounted = await self._send(journal, batch, totals)
            if uncounted == REFUSED:
                self._resync(journal, applied)
                return True
            if uncounted:
                log.warning("%d usage figures of %d records were not counted", uncounted, len(batch.entries))
        journal.acknowledge(batch)
        if broken:
            log.error("%d lines of the usage journal %s cannot be read and are left out", broken, journal.path)
            self._drop(broken)
        return bool(batch.entries)

    async def _send(self, journal: Journal, batch: Batch, totals: BatchTotals) -> tuple[int, int]:
        """Return the number of the last record applied, and how many figures were not counted, or REFUSED."""
        first, last = batch.entries[0].sequence, batch.entries[-1].sequence
        bounds = self._decisions.script_args() if self._decisions else (0, 0, 0)
        arguments = [journal.id, journal.applied, first, last, MAX_ENTRIES, *bounds, *totals.script_args()]
        keys = [JOURNALS, STREAM, DECISIONS, TIMES, BYTES, FEEDBACK]
        async with self._store.operation("record usage"):
            applied, uncounted = await self._apply(keys=keys, args=arguments)
        return int(applied), int(uncounted)

    def _resync(self, journal: Journal, applied: int) -> None:
        """Continue after the last record that Redis applied: its reply was lost, or it went back to an older state."""
        if applied < journal.applied:
            log.warning("the store went back: usage after record %d of %s is sent again", applied, journal.path)
            journal.rewind(applied)
        else:
            journal.applied = applied

    def _remove(self, journal: Journal) -> None:
        """Remove the file now, and its number in Redis later: a file without its number would be applied again."""
        try:
            self._journals.remove(journal)
        except OSError as error:
            raise StoreUnavailable(f"could not remove the usage journal {journal.path}: {error}") from error
        self._finished.append(journal.id)

    async def _finish_removed(self) -> None:
        while self._finished:
            async with self._store.operation("record usage"):
                await self._finish(keys=[JOURNALS], args=[self._finished[-1], FINISHED_KEPT_S])
            self._finished.pop()

    def _drop(self, records: int) -> None:
        for _ in range(records):
            self._on_dropped()

    async def _write_loop(self) -> None:
        loop = asyncio.get_running_loop()
        claimed_at = -CLAIM_INTERVAL_S
        while True:
            if loop.time() - claimed_at >= CLAIM_INTERVAL_S:
                claimed_at = loop.time()
                self._journals.claim_orphans()
            self._journals.write_unwritten()
            try:
                await self.flush()
                self._availability.mark_available()
                await asyncio.sleep(FLUSH_INTERVAL_S)
            except StoreUnavailable as error:
                self._availability.mark_unavailable(f"usage waits in its journals: {error}")
                await asyncio.sleep(RETRY_INTERVAL_S)


def _next_batch(journal: Journal) -> Batch:
    try:
        return journal.read(BATCH_SIZE)
    except OSError as error:
        raise StoreUnavailable(f"could not record usage: {journal.path} cannot be read: {error}") from error


async def _totals_of(batch: Batch, *, keep_decisions: bool) -> tuple[BatchTotals, int]:
    """Return the totals, and how many lines cannot be read. Other tasks get turns meanwhile."""
    totals, broken = BatchTotals(keep_decisions), batch.broken
    for index, entry in enumerate(batch.entries):
        if index % RECORDS_PER_TURN == 0:
            await asyncio.sleep(0)
        try:
            totals.add(entry.text, entry.fields)
        except ValueError:
            broken += 1
    return totals, broken
