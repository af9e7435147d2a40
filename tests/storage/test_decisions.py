from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxy.storage import decisions as module
from proxy.storage.decisions import BYTES, DECISIONS, TIMES, Cursor, DecisionBounds, DecisionFilter, DecisionStore
from proxy.storage.redis import Store
from proxy.storage.usage import UsageRecord
from proxy.storage.usage_journal import JournalDirectory
from proxy.storage.usage_writer import STREAM, UsageWriter

DETAIL: dict[str, Any] = {
    "request": "r",
    "api": "chat",
    "requested": "auto",
    "lambda": 0.1,
    "version": 1,
    "map": "m",
    "chosen_s": 0.001,
    "clusters": [[3], ["sums"], [1.0]],
    "attempts": [["small", 0.002, "complete", None, 1.5]],
    "ineligible": {},
    "failed_usd": 0.0,
    "baseline": "large",
    "baseline_usd": 1.25,
    "fingerprint": "f",
}
TTL_S = 3600
WIDE = DecisionBounds(TTL_S, 1000, 10**9, 10**6)


def a_record(decision: str, *, at: float | None = None, model: str = "small") -> UsageRecord:
    ended_at = time.time() if at is None else at
    return UsageRecord(decision, ended_at, model, None, "scored", "complete", 10, 4, 5, None, 0.25, 1.5, 0.5)


class Kept:
    """Decisions that a writer has written, with a reader of them."""

    def __init__(self, store: Store, folder: Path, bounds: DecisionBounds | None = WIDE) -> None:
        self.store = store
        self.writer = UsageWriter(store, JournalDirectory(folder, 10**9), decisions=bounds)
        self.reader = DecisionStore(store, TTL_S)

    async def write(self, *records: UsageRecord, detail: dict[str, Any] = DETAIL) -> None:
        for record in records:
            self.writer.record(record, json.dumps(detail))
        await self.writer.flush()

    async def ids(self, **wanted: Any) -> list[str]:
        page = await self.reader.page(100, DecisionFilter(**wanted))
        return [decision["id"] for decision in page.decisions]


async def test_the_oldest_decisions_go_first_when_there_are_too_many(store: Store, tmp_path: Path) -> None:
    kept, now = Kept(store, tmp_path, replace(WIDE, max_decisions=3)), time.time()
    await kept.write(*(a_record(f"dec-{number}", at=now + number) for number in range(5)))

    assert await kept.ids() == ["dec-4", "dec-3", "dec-2"]
    assert await store.client.hlen(DECISIONS) == await store.client.zcard(TIMES) == 3


async def test_the_bytes_of_all_decisions_are_counted_and_bounded(store: Store, tmp_path: Path) -> None:
    kept, now = Kept(store, tmp_path), time.time()
    await kept.write(a_record("dec-0", at=now))
    size = int(await store.client.get(BYTES) or 0)
    kept.writer._decisions = replace(WIDE, max_bytes=2 * size + 10)
    await kept.write(*(a_record(f"dec-{number}", at=now + number) for number in range(1, 5)))

    texts: Any = await store.client.hvals(DECISIONS)
    assert await kept.ids() == ["dec-4", "dec-3"]
    assert int(await store.client.get(BYTES) or 0) == sum(len(text.encode()) for text in texts) <= 2 * size + 10


async def test_a_decision_that_is_too_old_is_neither_kept_nor_shown(store: Store, tmp_path: Path) -> None:
    kept, now = Kept(store, tmp_path), time.time()
    await kept.write(a_record("dec-old", at=now - TTL_S - 1), a_record("dec-new", at=now))
    await store.client.zadd(TIMES, {"dec-new": now - TTL_S - 1})  # as if no request had come since

    assert await store.client.hkeys(DECISIONS) == ["dec-new"]
    assert await kept.ids() == []
    assert await kept.reader.find("dec-new") is None
    assert 0 < await store.client.ttl(DECISIONS) <= TTL_S


async def test_a_batch_that_is_sent_again_is_kept_once(store: Store, tmp_path: Path) -> None:
    kept = Kept(store, tmp_path)
    await kept.write(a_record("dec-1"))
    size = await store.client.get(BYTES)
    kept.writer._journals.all[0].rewind(0)
    await store.client.delete("uniroute:usage:journals")  # the store went back to before the batch
    await kept.writer.flush()

    assert await kept.ids() == ["dec-1"]
    assert await store.client.get(BYTES) == size


async def test_a_flood_is_recorded_in_part_and_the_rest_is_counted(store: Store, tmp_path: Path) -> None:
    now = 100.0
    skipped: list[int] = []
    journals, bounds = JournalDirectory(tmp_path, 10**9), replace(WIDE, max_per_s=2)
    writer = UsageWriter(store, journals, decisions=bounds, on_skipped=lambda: skipped.append(1), clock=lambda: now)

    assert [writer.takes_decision() for _ in range(4)] == [True, True, False, False]
    now = 101.0
    assert writer.takes_decision()
    assert len(skipped) == 2


async def test_nothing_is_recorded_where_decisions_are_off(store: Store, tmp_path: Path) -> None:
    skipped: list[int] = []
    writer = UsageWriter(store, JournalDirectory(tmp_path, 10**9), on_skipped=lambda: skipped.append(1))

    assert (writer.takes_decision(), skipped) == (False, [])


async def test_the_stream_of_usage_has_nothing_of_the_decision(store: Store, tmp_path: Path) -> None:
    kept = Kept(store, tmp_path)
    trap = replace(a_record("dec-1"), model='x","detail":{}')
    await kept.write(trap)
    entries: Any = await store.client.xrange(STREAM)

    assert json.loads(entries[0][1]["record"]) == {"seq": 1, **json.loads(trap.to_json())}
    assert await kept.ids() == ["dec-1"]


async def test_no_decisions_are_kept_without_bounds(store: Store, tmp_path: Path) -> None:
    kept = Kept(store, tmp_path, None)
    await kept.write(a_record("dec-1"))  # from a journal of a process that kept them

    assert await store.client.exists(DECISIONS, TIMES, BYTES) == 0
    assert await store.client.xlen(STREAM) == 1


async def test_pages_continue_among_decisions_of_the_same_moment(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_SIZE", 3)
    kept, now = Kept(store, tmp_path), time.time()
    await kept.write(*(a_record(f"dec-{number}", at=now) for number in range(8)))
    seen: list[str] = []
    after: Cursor | None = None
    while not seen or after is not None:
        page = await kept.reader.page(2, after=after)
        seen += [decision["id"] for decision in page.decisions]
        after = None if page.next is None else Cursor.parse(str(page.next))
    assert seen == [f"dec-{number}" for number in range(7, -1, -1)]


async def test_a_rare_filter_looks_at_a_bounded_number_and_says_where_to_go_on(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SCANNED", 4)
    kept, now = Kept(store, tmp_path), time.time()
    await kept.write(a_record("rare", at=now, model="large"), *(a_record(f"dec-{n}", at=now + n) for n in range(1, 6)))
    first = await kept.reader.page(1, DecisionFilter(model="large"))
    second = await kept.reader.page(1, DecisionFilter(model="large"), first.next)

    assert first.decisions == []
    assert [decision["id"] for decision in second.decisions] == ["rare"]


async def test_a_decision_that_another_program_wrote_is_passed_over(store: Store, tmp_path: Path) -> None:
    kept = Kept(store, tmp_path)
    await kept.write(a_record("dec-1"))
    for number, text in enumerate(("{}", "no JSON", '{"detail": {"attempts": 5}}')):
        await store.client.hset(DECISIONS, f"odd-{number}", text)
        await store.client.zadd(TIMES, {f"odd-{number}": time.time()})

    assert await kept.ids() == ["dec-1"]
    assert await kept.reader.find("odd-0") is None


async def test_a_store_that_holds_something_else_loses_no_usage(store: Store, tmp_path: Path) -> None:
    await store.client.set(DECISIONS, "a text")
    kept = Kept(store, tmp_path)
    await kept.write(a_record("dec-1"))
    assert await store.client.xlen(STREAM) == 1
