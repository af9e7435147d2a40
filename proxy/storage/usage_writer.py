from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

from proxy.concurrency import BackgroundTasks
from proxy.storage.decisions import BYTES, DECISIONS, DETAIL, FEEDBACK, TIMES, DecisionBounds
from proxy.storage.redis import Availability, Store, StoreUnavailable, evaluate, load_script
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


_SUMMED = (*COUNTED, *COUNTED_SINCE)


class BatchTotals:
    """Add up the records of one batch, for apply_usage.lua.

    Args:
        keep_decisions: whether the details of decisions are kept.
    """

    __slots__ = ("_groups", "decisions", "keep_decisions", "settlements", "texts")

    def __init__(self, *, keep_decisions: bool = False) -> None:
        self.keep_decisions = keep_decisions
        self.texts: list[str] = []
        # Of each record of a client key: key, reservation, tokens, picodollars, day and month (UTC).
        self.settlements: list[str] = []
        # Of each decision: its id, the time of its end, and its record.
        self.decisions: list[str] = []
        # (model, day, key, ending) → requests, tokens in the order of _SUMMED, costs not known, picodollars, USD.
        self._groups: dict[tuple[str, str, str | None, str], list[Any]] = {}

    def add_line(self, text: str, record: Mapping[str, Any]) -> None:
        """Add a line of a journal. Raise ValueError, with nothing added, if it is no record that UniRoute writes."""
        try:
            tokens = [int(record[name] or 0) for name in COUNTED]
            tokens += [int(record.get(name) or 0) for name in COUNTED_SINCE]
            cost, usd = record["cost_picousd"], record["cost_usd"]
            if cost is None or not 0 <= cost <= MAX_COUNT:
                cost = None
            else:
                cost, usd = int(cost), float(usd)
            model, ending, key_id = str(record["model"]), str(record["ending"]), record["key_id"]
            day = _day(int(record["at"] // DAY_S))
            prompt, output = record["prompt_tokens"], record["output_tokens"]
            total = None if prompt is None or output is None else prompt + output
            decision = (str(record["decision"]), record["at"]) if DETAIL in record else None
            reservation = str(record["reservation"] or "")
        except (KeyError, TypeError, OverflowError, OSError) as error:
            raise ValueError(f"not a usage record: {type(error).__name__} {error}") from error
        if decision is not None:
            if self.keep_decisions:
                self.decisions += [decision[0], str(decision[1]), text]
            # No text in the JSON before can hold this: its quotes would be escaped.
            text = text[: text.index(f',"{DETAIL}":')] + "}"
        self.texts.append(text)
        self._count(model, day, str(key_id) if key_id else None, ending, tokens, cost, usd)
        if key_id:
            self._settle(str(key_id), reservation, total, cost, day)

    def add(self, entry: UsageRecord, text: str, whole: str | None) -> None:
        """Add a record as `add_line` adds its line.

        Args:
            text: the line without the details of the decision.
            whole: the line with them. None: it has none.
        """
        if whole is not None and self.keep_decisions:
            self.decisions += (entry.decision, str(entry.at), whole)
        self.texts.append(text)
        day, cost, usd = _day(int(entry.at // DAY_S)), entry.cost_picousd, entry.cost_usd
        if cost is not None and not 0 <= cost <= MAX_COUNT:
            cost = None
        tokens = (
            entry.prompt_tokens or 0,
            entry.cached_tokens or 0,
            entry.output_tokens or 0,
            entry.reasoning_tokens or 0,
            entry.cache_write_tokens or 0,
            entry.audio_input_tokens or 0,
            entry.audio_output_tokens or 0,
        )
        key_id = entry.key_id or None
        self._count(entry.model, day, key_id, entry.ending, tokens, cost, usd)
        if key_id:
            self._settle(key_id, entry.reservation or "", entry.total_tokens, cost, day)

    def script_args(self) -> list[str]:
        """Return the totals as apply_usage.lua reads them."""
        sums = self.sums()
        arguments = [str(len(self.texts)), *self.texts, str(len(sums))]
        for (key, name), amount in sums.items():
            arguments += (key, name, repr(amount))
        return [*arguments, str(len(self.decisions) // 3), *self.decisions, *self.settlements]

    def sums(self) -> dict[tuple[str, str], int | float]:
        """Return (hash, field) → the amount to add."""
        sums: defaultdict[tuple[str, str], int | float] = defaultdict(int)
        for (model, day, key_id, ending), (requests, *tokens, unknown, picousd, usd) in self._groups.items():
            amounts: dict[str, int | float] = {"requests": requests, ending: requests}
            amounts |= {name: count for name, count in zip(_SUMMED, tokens, strict=True) if count}
            if unknown:
                amounts["cost_unknown"] = unknown
            if requests > unknown:
                amounts["cost_picousd"], amounts["cost_usd"] = picousd, usd
            hashes = [f"{TOTALS}:{model}", f"{DAY_TOTALS}:{day}"]
            if key_id is not None:
                hashes.append(f"{KEY_TOTALS}:{key_id}")
            for key in hashes:
                for name, amount in amounts.items():
                    sums[key, name] += amount
        return sums

    def _count(
        self,
        model: str,
        day: str,
        key_id: str | None,
        ending: str,
        tokens: Sequence[int],
        picousd: int | None,
        usd: float | None,
    ) -> None:
        group = self._groups.get((model, day, key_id, ending))
        if group is None:
            group = self._groups[model, day, key_id, ending] = [0] * 10 + [0.0]
        group[0] += 1
        for place, count in enumerate(tokens, 1):
            if count:
                group[place] += count
        if picousd is None:
            group[8] += 1
        else:
            group[9] += picousd
            group[10] += usd

    def _settle(self, key_id: str, reservation: str, tokens: int | None, picousd: int | None, day: str) -> None:
        amounts = ("" if tokens is None else str(tokens), "" if picousd is None else str(picousd))
        self.settlements += (key_id, reservation, *amounts, day, day[:7])


@lru_cache(maxsize=8)
def _day(days: int) -> str:
    """Return the date (UTC) that is so many days after 1970-01-01."""
    return datetime.fromtimestamp(days * DAY_S, UTC).strftime("%Y-%m-%d")


@dataclass(slots=True)
class SummedBatch:
    """Records that follow one another in a journal, added up."""

    first: int
    """Sequence numbers, of the first record and of the last."""
    last: int
    end: int
    """Offset in the file of what comes after them, or less."""
    totals: BatchTotals
    bytes: int = 0
    is_open: bool = True


class SummedRecords:
    """Keep the sums of what this process has written to its journals and Redis has not taken, so that no file is read.

    For each journal it has all such records, or none: after a restart, when Redis went back to an older state, or when
    the sums would take more than MAX_SUMMED_BYTES. Then the file is read, up to its end.
    """

    def __init__(self, *, keep_decisions: bool) -> None:
        self._keep_decisions = keep_decisions
        self._batches: dict[Journal, deque[SummedBatch]] = {}
        self._bytes = 0

    def add(self, journal: Journal, entry: UsageRecord, text: str, detail: str) -> None:
        """Add the record that was just appended to the journal. `text`: without its number."""
        batches, sequence = self._batches.get(journal), journal.sequence
        if batches is None:
            if sequence != 1:
                return
            batches = self._batches[journal] = deque()
        if not batches or not batches[-1].is_open or sequence - batches[-1].first >= BATCH_SIZE:
            batches.append(SummedBatch(sequence, sequence, 0, BatchTotals(keep_decisions=self._keep_decisions)))
        batch = batches[-1]
        line = f'{{"seq": {sequence}, {text[1:]}'
        batch.totals.add(entry, line, f'{line[:-1]},"{DETAIL}":{detail}}}' if detail else None)
        batch.last, batch.end = sequence, journal.size
        size = len(text) + len(detail)
        batch.bytes += size
        self._bytes += size
        if self._bytes > MAX_SUMMED_BYTES:
            self.clear()

    def has(self, journal: Journal) -> bool:
        """Return whether it has all records of the journal that Redis has not taken."""
        return journal in self._batches

    def next_batch(self, journal: Journal) -> SummedBatch | None:
        """Return the next batch, to which nothing is added from now on; None: there is none."""
        batches = self._batches[journal]
        if not batches:
            return None
        batches[0].is_open = False
        return batches[0]

    def drop_applied(self, journal: Journal, applied: int) -> None:
        """Drop the batches up to the record `applied`, or all if one of them is applied in part."""
        batches = self._batches.get(journal, ())
        while batches and batches[0].last <= applied:
            self._bytes -= batches.popleft().bytes
        if batches and batches[0].first <= applied:
            self.forget(journal)

    def resume(self, journal: Journal) -> None:
        """Add up what is appended from now on: Redis has taken all that the journal has."""
        self._batches.setdefault(journal, deque())

    def forget(self, journal: Journal) -> None:
        self._bytes -= sum(batch.bytes for batch in self._batches.pop(journal, ()))

    def clear(self) -> None:
        self._batches.clear()
        self._bytes = 0


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

# Records that are read and added up before other tasks get a turn.
RECORDS_PER_TURN = 40

# Of records whose sums are kept in memory.
MAX_SUMMED_BYTES = 16 * 2**20

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
        self._summed = SummedRecords(keep_decisions=decisions is not None)
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
        if self._journals.append(f'{text[:-1]},"{DETAIL}":{detail}}}' if detail else text):
            self._summed.add(self._journals.current, entry, text, detail)
        else:
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
        self._summed.clear()
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
        if not self._summed.has(journal):
            return await self._apply_lines(journal)
        batch = self._summed.next_batch(journal)
        if batch is None:
            return False
        if await self._send(journal, batch.first, batch.last, batch.totals):
            journal.acknowledge(batch.last, batch.end)
            self._summed.drop_applied(journal, batch.last)
        return True

    async def _apply_lines(self, journal: Journal) -> bool:
        """Read a journal's next batch, and write it to Redis; return False if there was none."""
        batch = _next_batch(journal)
        totals, broken = await _totals_of(batch, keep_decisions=self._decisions is not None)
        if batch.entries and not await self._send(journal, batch.entries[0].sequence, batch.last, totals):
            return True
        journal.acknowledge(batch.last, batch.end)
        if broken:
            log.error("%d lines of the usage journal %s cannot be read and are left out", broken, journal.path)
            self._drop(broken)
        if not batch.entries and self._journals.is_open(journal) and journal.fully_applied:
            self._summed.resume(journal)
        return bool(batch.entries)

    async def _send(self, journal: Journal, first: int, last: int, totals: BatchTotals) -> bool:
        """Write the records `first` to `last`; return False if Redis expects others, which come next then."""
        bounds = self._decisions.script_args() if self._decisions else (0, 0, 0)
        about = (journal.id, *map(str, (journal.applied, first, last, MAX_ENTRIES, *bounds)))
        keys = (JOURNALS, STREAM, DECISIONS, TIMES, BYTES, FEEDBACK)
        async with self._store.operation("record usage") as client:
            applied, uncounted = await evaluate(client, self._apply, keys, (*about, *totals.script_args()))
        if uncounted == REFUSED:
            self._resync(journal, applied)
            return False
        if uncounted:
            log.warning("%d usage figures of %d records were not counted", uncounted, len(totals.texts))
        return True

    def _resync(self, journal: Journal, applied: int) -> None:
        """Continue after the last record that Redis applied: its reply was lost, or it went back to an older state."""
        if applied < journal.applied:
            log.warning("the store went back: usage after record %d of %s is sent again", applied, journal.path)
            journal.rewind(applied)
            self._summed.forget(journal)
        else:
            journal.acknowledge(applied)
            self._summed.drop_applied(journal, applied)

    def _remove(self, journal: Journal) -> None:
        """Remove the file now, and its number in Redis later: a file without its number would be applied again."""
        try:
            self._journals.remove(journal)
        except OSError as error:
            raise StoreUnavailable(f"could not remove the usage journal {journal.path}: {error}") from error
        self._summed.forget(journal)
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
    totals, broken = BatchTotals(keep_decisions=keep_decisions), batch.broken
    for index, entry in enumerate(batch.entries):
        if index % RECORDS_PER_TURN == 0:
            await asyncio.sleep(0)
        try:
            totals.add_line(entry.text, entry.fields)
        except ValueError:
            broken += 1
    return totals, broken
