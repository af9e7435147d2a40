"""Usage from the journals to Redis, in the background. `record` never waits for Redis and never fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from proxy.concurrency import end
from proxy.recording.journal import Batch, Journal
from proxy.recording.journals import Journals
from proxy.recording.scripts import (
    FINISH,
    FINISHED_KEPT_S,
    JOURNALS,
    MOST_ENTRIES,
    NO_SETTLING,
    REFUSED,
    STREAM,
    apply_script,
)
from proxy.recording.tally import Tally
from proxy.recording.usage import UsageRecord
from proxy.state.store import Store, StoreUnavailable

log = logging.getLogger("uniroute.usage")

BATCH = 200
AT_ONCE = 40
"""Records that are added up before requests get a turn."""
FLUSH_S = 0.5
RETRY_S = 1.0
ADOPT_S = 5.0


class UsageRecorder:
    """What is recorded is in a file at once, and in Redis soon: once, also when it was sent twice."""

    def __init__(
        self,
        store: Store,
        journals: Journals,
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
        await end(self._writing)
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
        tally, broken = await _tally_of(batch)
        if batch.entries:
            applied, uncounted = await self._send(journal, batch, tally)
            if uncounted == REFUSED:
                self._go_on_after(journal, applied)
                return True
            if uncounted:
                log.warning("%d usage figures of %d records were not counted", uncounted, len(batch.entries))
        journal.mark(batch)
        if broken:
            log.error("%d lines of the usage journal %s cannot be read and are left out", broken, journal.path)
            self._drop(broken)
        return bool(batch.entries)

    async def _send(self, journal: Journal, batch: Batch, tally: Tally) -> tuple[int, int]:
        first, last = batch.entries[0].number, batch.entries[-1].number
        arguments = [journal.id, journal.applied, first, last, MOST_ENTRIES, *tally.words()]
        async with self._store.asking("record usage"):
            applied, uncounted = await self._apply(keys=[JOURNALS, STREAM], args=arguments)
        return int(applied), int(uncounted)

    def _go_on_after(self, journal: Journal, applied: int) -> None:
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


async def _tally_of(batch: Batch) -> tuple[Tally, int]:
    """And how many lines are no records of ours. Requests get a turn meanwhile."""
    tally, broken = Tally(), batch.broken
    for place, entry in enumerate(batch.entries):
        if place % AT_ONCE == 0:
            await asyncio.sleep(0)
        try:
            tally.add(entry.text, entry.fields)
        except ValueError:
            broken += 1
    return tally, broken
