"""Usage that is added up when it is recorded, and read from the file only when that is not to be had."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.settings.redis_address import RedisAddress
from proxy.storage import usage_writer as writer_module
from proxy.storage.redis import Store, StoreUnavailable
from proxy.storage.usage import UsageRecord
from proxy.storage.usage_journal import Journal, JournalDirectory
from proxy.storage.usage_writer import (
    BATCH_SIZE,
    DAY_TOTALS,
    JOURNALS,
    KEY_TOTALS,
    STREAM,
    TOTALS,
    BatchTotals,
    SummedRecords,
    UsageWriter,
)

COUNTS = st.none() | st.integers(0, 10**9)
TEXTS = st.sampled_from(["small", "größe", 'a"b', ',"detail":{', "\ud800"])
RECORDS = st.builds(
    UsageRecord,
    decision=TEXTS,
    at=st.floats(1.7e9, 1.7e9 + 3 * 86_400),
    model=TEXTS,
    key_id=st.none() | st.sampled_from(["k-1", "k-2"]),
    reason=st.just("scored"),
    ending=st.sampled_from(["complete", "failed"]),
    prompt_tokens=COUNTS,
    cached_tokens=COUNTS,
    output_tokens=COUNTS,
    reasoning_tokens=COUNTS,
    cost_usd=st.none() | st.floats(0, 10**4) | st.sampled_from([1e13, 0.0]),
    seconds=st.floats(0, 10),
    first_token_s=st.none(),
    reservation=st.none() | TEXTS,
    cache_write_tokens=COUNTS,
    audio_input_tokens=COUNTS,
    audio_output_tokens=COUNTS,
    tags=st.just(("a",)),
)
DETAILS = st.sampled_from(["", '{"a": 1}', '{"detail": "größe"}'])


@settings(deadline=None)
@given(st.lists(st.tuples(RECORDS, DETAILS), max_size=12), st.booleans())
def test_what_is_added_up_in_memory_is_what_the_file_adds_up_to(
    recorded: list[tuple[UsageRecord, str]], keep_decisions: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        journals, summed = JournalDirectory(Path(folder), 10**9), SummedRecords(keep_decisions=keep_decisions)
        for record, detail in recorded:
            text = record.to_json()
            journals.append(f'{text[:-1]},"detail":{detail}}}' if detail else text)
            summed.add(journals.current, record, text, detail)
        batch = journals.current.read(BATCH_SIZE)
        read = BatchTotals(keep_decisions=keep_decisions)
        for entry in batch.entries:
            read.add_line(entry.text, entry.fields)
        kept = summed.next_batch(journals.current) if recorded else None
        journals.close()

    assert (BatchTotals() if kept is None else kept.totals).script_args() == read.script_args()
    assert kept is None or (kept.first, kept.last, kept.end) == (1, batch.last, batch.end)


def a_record(number: int = 1) -> UsageRecord:
    decision, cost = f"dec-{number}", 1e-7 * number + 3e-12
    return UsageRecord(decision, 1.7e9, "small", "k", "scored", "complete", number, 0, 1, None, cost, 1.5, 0.5)


def a_writer(store: Store, folder: Path) -> UsageWriter:
    return UsageWriter(store, JournalDirectory(folder, 10**9))


def left_in(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def run_and_kill(url: RedisAddress | str, folder: Path, step: str, count: int) -> int:
    """Return the exit status of a process that is killed at this step."""
    return subprocess.run(
        [sys.executable, "-c", KILLED, str(url), str(folder), step, str(count)], check=False
    ).returncode


async def totals(store: Store, key: str = f"{TOTALS}:small") -> dict[str, str]:
    found: Any = await store.client.hgetall(key)
    return dict(found)


async def assert_counted_once(store: Store, count: int) -> None:
    entries: Any = await store.client.xrange(STREAM)
    decisions = [json.loads(fields["record"])["decision"] for _, fields in entries]
    numbers = range(1, count + 1)
    assert decisions == [f"dec-{number}" for number in numbers]
    for key in (f"{TOTALS}:small", f"{KEY_TOTALS}:k", f"{DAY_TOTALS}:2023-11-14"):
        counted = await totals(store, key)
        sums = (str(count), str(sum(numbers)), str(sum(a_record(number).cost_picousd or 0 for number in numbers)))
        assert (counted["requests"], counted["prompt_tokens"], counted["cost_picousd"]) == sums


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List the journals that are read."""
    read: list[str] = []
    real = Journal.read

    def noted(journal: Journal, most: int) -> Any:
        read.append(journal.id)
        return real(journal, most)

    monkeypatch.setattr(Journal, "read", noted)
    return read


async def test_a_journal_is_not_read_by_the_process_that_writes_it(
    store: Store, tmp_path: Path, unread: list[str]
) -> None:
    writer = a_writer(store, tmp_path)
    for number in range(1, 2 * BATCH_SIZE + 8):
        writer.record(a_record(number))
    await writer.flush()
    writer.record(a_record(2 * BATCH_SIZE + 8))
    await writer.stop()

    await assert_counted_once(store, 2 * BATCH_SIZE + 8)
    assert unread == []


async def test_sums_that_take_too_much_memory_are_dropped_and_the_file_is_read(
    store: Store, tmp_path: Path, unread: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "MAX_SUMMED_BYTES", 20_000)
    writer = a_writer(store, tmp_path)
    for number in range(1, 301):
        writer.record(a_record(number))
    await writer.flush()
    assert unread != []
    unread.clear()
    for number in range(301, 311):
        writer.record(a_record(number))
    await writer.flush()

    await assert_counted_once(store, 310)
    assert unread == []


async def test_records_of_a_batch_under_way_are_in_the_next(store: Store, tmp_path: Path) -> None:
    writer = a_writer(store, tmp_path)
    writer.record(a_record(1))
    flushing = asyncio.create_task(writer.flush())
    number = 1
    while not flushing.done():
        await asyncio.sleep(0)
        if number < 150:
            writer.record(a_record(number := number + 1))
    await writer.flush()
    await assert_counted_once(store, number)


async def test_a_reply_that_was_lost_counts_nothing_twice(store: Store, tmp_path: Path) -> None:
    losses = ["the reply was lost"]

    class Losing(UsageWriter):
        async def _send(self, *batch: Any) -> bool:
            done = await super()._send(*batch)
            if losses:
                raise StoreUnavailable(losses.pop())
            return done

    writer = Losing(store, JournalDirectory(tmp_path, 10**9))
    for number in range(1, 6):
        writer.record(a_record(number))
    with pytest.raises(StoreUnavailable):
        await writer.flush()
    writer.record(a_record(6))
    await writer.flush()
    await assert_counted_once(store, 6)


async def test_a_store_that_went_back_gets_the_rest_from_the_file(
    store: Store, tmp_path: Path, unread: list[str]
) -> None:
    writer = a_writer(store, tmp_path)
    for number in range(1, 8):
        writer.record(a_record(number))
    await writer.flush()
    await store.client.flushall()
    writer.record(a_record(8))
    await writer.flush()
    await assert_counted_once(store, 8)
    assert unread != []


async def test_records_that_the_disk_did_not_take_are_counted_once(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "usage"
    folder.write_text("a file is in the way")
    writer = a_writer(store, folder)
    writer.record(a_record(1))
    await writer.flush()
    writer.record(a_record(2))
    folder.unlink()
    writer._journals.write_unwritten()
    writer.record(a_record(3))
    await writer.flush()
    await assert_counted_once(store, 3)
    assert writer._journals.current.fully_applied


# What a process does that is killed at one step. The step kills it when it comes for the second time, if it can.
KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from proxy.storage import usage_writer
from proxy.storage.redis import Store
from proxy.storage.usage_journal import Journal, JournalDirectory
from tests.storage.test_usage_sums import a_record

url, folder, step, count = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
seen = 0

def reach(name, times=1):
    global seen
    if name == step:
        seen += 1
        if seen >= times:
            os.kill(os.getpid(), signal.SIGKILL)

class Summed(usage_writer.SummedRecords):
    def add(self, journal, entry, text, detail):
        if entry.decision == f"dec-{count}":
            reach("between the line and the sum")
        super().add(journal, entry, text, detail)

    def drop_applied(self, journal, applied):
        reach("after the acknowledgement", 2)
        super().drop_applied(journal, applied)

class Writer(usage_writer.UsageWriter):
    async def _send(self, *batch):
        reach("before a batch is sent", 2)
        done = await super()._send(*batch)
        reach("before its reply is noted", 2)
        return done

    def _remove(self, journal):
        reach("before the file is removed")
        super()._remove(journal)
        reach("before its number is marked as done")

usage_writer.SummedRecords = Summed

async def main():
    store = Store(url)
    writer = Writer(store, JournalDirectory(folder, 10**9))
    for number in range(1, count + 1):
        writer.record(a_record(number))
    reach("before the flush")
    sending = asyncio.create_task(writer.stop())
    if step == "while a batch is on its way":
        while not await store.client.exists(usage_writer.JOURNALS):
            pass
        reach(step)
    await sending
    reach("after all")

asyncio.run(main())
"""

STEPS = (
    "between the line and the sum",
    "before the flush",
    "before a batch is sent",
    "while a batch is on its way",
    "before its reply is noted",
    "after the acknowledgement",
    "before the file is removed",
    "before its number is marked as done",
    "after all",
)


@pytest.mark.parametrize("step", STEPS)
async def test_a_process_that_is_killed_at_any_step_loses_no_record_and_doubles_none(
    store: Store, tmp_path: Path, step: str
) -> None:
    count = 2 * BATCH_SIZE + 50
    assert await asyncio.to_thread(run_and_kill, store.url, tmp_path, step, count) == -signal.SIGKILL

    heir = a_writer(store, tmp_path)
    heir._journals.claim_orphans()
    await heir.flush()
    await assert_counted_once(store, count)
    assert left_in(tmp_path) == []
    await heir.stop()


async def test_the_heirs_heir_goes_on_where_the_second_process_was_killed(store: Store, tmp_path: Path) -> None:
    count = 2 * BATCH_SIZE + 50
    first = a_writer(store, tmp_path)
    for number in range(1, count + 1):
        first.record(a_record(number))
    await first._apply_batch(first._journals.current)
    first._journals.close()
    second = a_writer(store, tmp_path)
    second._journals.claim_orphans()
    await second._apply_batch(second._journals.all[0])
    second._journals.close()
    third = a_writer(store, tmp_path)
    third._journals.claim_orphans()
    await third.flush()
    await assert_counted_once(store, count)
    assert [state.partition(":")[0] for state in (await totals(store, JOURNALS)).values()] == ["done"]
