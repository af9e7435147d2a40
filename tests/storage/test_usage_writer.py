from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxy.storage.redis import Store, StoreUnavailable
from proxy.storage.usage import UsageRecord
from proxy.storage.usage_journal import JournalDirectory
from proxy.storage.usage_writer import JOURNALS, KEY_TOTALS, STREAM, TOTALS, UsageWriter

SETTLE = """
local function settle(key_id, reservation_id, tokens, picousd, day, month)
  redis.call('RPUSH', 'settled', table.concat({key_id, reservation_id, tokens, picousd, day, month}, ' '))
end
"""


def a_record(decision: str = "dec-1", cost: float | None = 0.25, ending: str = "complete") -> UsageRecord:
    return UsageRecord(decision, 1.7e9, "small", None, "scored", ending, 10, 4, 5, None, cost, 1.5, 0.5)


def a_writer(store: Store, folder: Path, **more: Any) -> UsageWriter:
    return UsageWriter(store, JournalDirectory(folder, 10**9), **more)


def left_in(folder: Path) -> list[Path]:
    return list(folder.iterdir())


async def totals(store: Store, key: str = f"{TOTALS}:small") -> dict[str, str]:
    found: Any = await store.client.hgetall(key)
    return dict(found)


async def test_records_and_totals_reach_redis(store: Store, tmp_path: Path) -> None:
    writer = a_writer(store, tmp_path)
    writer.record(a_record("dec-1"))
    writer.record(a_record("dec-2", cost=None, ending="broken"))
    await writer.flush()
    entries: Any = await store.client.xrange(STREAM)
    counted = await totals(store)

    assert [json.loads(fields["record"])["decision"] for _, fields in entries] == ["dec-1", "dec-2"]
    assert (counted["requests"], counted["prompt_tokens"], counted["output_tokens"]) == ("2", "20", "10")
    assert (float(counted["cost_usd"]), counted["cost_unknown"], counted["broken"]) == (0.25, "1", "1")


async def test_spend_is_summed_exactly_in_picodollars(store: Store, tmp_path: Path) -> None:
    writer = a_writer(store, tmp_path)
    costs = [1e-7 * number + 3e-12 for number in range(1, 2001)] + [9_000.000_000_000_001]
    for cost in costs:
        writer.record(replace(a_record(), cost_usd=cost, key_id="key-1"))
    await writer.flush()
    exact = str(sum(round(cost * 10**12) for cost in costs))
    assert (await totals(store))["cost_picousd"] == exact
    assert (await totals(store, f"{KEY_TOTALS}:key-1"))["cost_picousd"] == exact


async def test_each_usage_record_of_a_key_settles_its_limits(store: Store, tmp_path: Path) -> None:
    writer = a_writer(store, tmp_path, settle_function=SETTLE)
    writer.record(a_record())  # nobody's
    writer.record(replace(a_record(), key_id="k", reservation="r-1"))
    writer.record(replace(a_record(cost=None), key_id="k", output_tokens=None))
    await writer.flush()
    settled: Any = await store.client.lrange("settled", 0, -1)
    assert settled == ["k r-1 15 250000000000 2023-11-14 2023-11", "k    2023-11-14 2023-11"]


async def test_a_failed_settlement_is_counted_and_blocks_nothing(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await store.client.set("settled", "wrong type")
    writer = a_writer(store, tmp_path, settle_function=SETTLE)
    writer.record(replace(a_record(), key_id="k"))
    await writer.flush()
    assert (await totals(store))["requests"] == "1"
    assert "1 usage figures" in caplog.text


async def test_a_batch_whose_reply_was_lost_is_counted_once(store: Store, tmp_path: Path) -> None:
    writer = a_writer(store, tmp_path)
    for _ in range(5):
        writer.record(a_record())
    (journal,) = writer._journals.all
    position, applied = journal._position, journal.applied
    await writer.flush()
    journal._position, journal.applied = position, applied  # as if nothing had been heard
    writer.record(a_record())
    await writer.flush()
    assert (await totals(store))["requests"] == "6"
    assert await store.client.xlen(STREAM) == 6


async def test_a_half_applied_journal_of_a_dead_process_is_finished_by_the_next(store: Store, tmp_path: Path) -> None:
    dead = a_writer(store, tmp_path)
    for _ in range(300):
        dead.record(a_record())
    assert await dead._apply_batch(dead._journals.all[0])  # one batch
    dead._journals.close()

    heir = a_writer(store, tmp_path)
    heir._journals.claim_orphans()
    await heir.flush()
    assert (await totals(store))["requests"] == "300"
    assert left_in(tmp_path) == []


async def test_records_wait_for_the_next_start_while_redis_is_away(store: Store, tmp_path: Path) -> None:
    away = Store("redis://127.0.0.1:1/0")
    writer = a_writer(away, tmp_path)
    writer.record(a_record())
    with pytest.raises(StoreUnavailable):
        await writer.flush()
    await writer.stop()
    writer.record(a_record())  # a request that was cut off while the process was closing
    writer._journals.close()
    await away.close()

    writer = a_writer(store, tmp_path)
    writer._journals.claim_orphans()
    await writer.flush()
    assert (await totals(store))["requests"] == "2"


async def test_an_orderly_stop_leaves_no_journal_and_no_sequence_number(store: Store, tmp_path: Path) -> None:
    writer = a_writer(store, tmp_path)
    writer.record(a_record())
    (journal,) = writer._journals.all
    lines = journal.read(10)
    await writer.stop()
    assert left_in(tmp_path) == []
    assert (await totals(store, JOURNALS))[journal.id].startswith("done:")

    late = a_writer(store, tmp_path)  # a copy of the journal's last batch, on its way all the while
    (tmp_path / f"{journal.id}.jsonl").write_text(lines.entries[0].text + "\n")
    late._journals.claim_orphans()
    await late.flush()
    assert (await totals(store))["requests"] == "1"


async def test_sequence_numbers_of_old_journals_are_forgotten(store: Store, tmp_path: Path) -> None:
    await store.client.hset(JOURNALS, mapping={"old": "done:1700000000", "in-use": "17"})
    writer = a_writer(store, tmp_path)
    writer.record(a_record())
    await writer.stop()
    assert set(await totals(store, JOURNALS)) - {"in-use"} != set()
    assert "old" not in await totals(store, JOURNALS)
    assert (await totals(store, JOURNALS))["in-use"] == "17"


async def test_a_store_that_lost_records_gets_them_again(store: Store, tmp_path: Path) -> None:
    writer = a_writer(store, tmp_path)
    for _ in range(3):
        writer.record(a_record())
    await writer.flush()
    older: Any = await totals(store), await totals(store, JOURNALS)
    for _ in range(4):
        writer.record(a_record())
    await writer.flush()
    await store.client.delete(f"{TOTALS}:small", JOURNALS)
    await store.client.hset(f"{TOTALS}:small", mapping=older[0])
    await store.client.hset(JOURNALS, mapping=older[1])

    writer.record(a_record())
    await writer.flush()
    assert (await totals(store))["requests"] == "8"


async def test_an_impossible_cost_is_unknown_and_spoils_no_sum(store: Store, tmp_path: Path) -> None:
    writer = a_writer(store, tmp_path)
    writer.record(a_record(cost=1e13))
    writer.record(a_record(cost=0.25))
    await writer.flush()
    counted = await totals(store)
    assert (counted["cost_picousd"], counted["cost_unknown"]) == (str(25 * 10**10), "1")


async def test_figures_that_cannot_be_counted_are_left_out_and_block_nothing(store: Store, tmp_path: Path) -> None:
    await store.client.lpush(f"{TOTALS}:small", "wrong type")
    writer = a_writer(store, tmp_path)
    writer.record(a_record())
    writer.record(replace(a_record(), model="other"))
    await writer.flush()
    assert await store.client.xlen(STREAM) == 2
    assert (await totals(store, f"{TOTALS}:other"))["requests"] == "1"
    assert writer._journals.all[0].fully_applied


async def test_lines_that_are_no_records_are_left_out_and_counted(store: Store, tmp_path: Path) -> None:
    dropped: list[None] = []
    (tmp_path / "dead.jsonl").write_text(
        'garbage\n{"seq": 1, "at": "then"}\n' + '{"seq": 2, ' + a_record().to_json()[1:] + "\n"
    )
    writer = a_writer(store, tmp_path, on_dropped=lambda: dropped.append(None))
    writer._journals.claim_orphans()
    await writer.flush()
    assert ((await totals(store))["requests"], len(dropped)) == ("1", 2)


async def test_a_full_store_refuses_the_whole_batch_and_takes_it_once_there_is_room(
    store: Store, tmp_path: Path
) -> None:
    writer = a_writer(store, tmp_path)
    writer.record(a_record())
    await store.client.config_set("maxmemory", "1")
    try:
        with pytest.raises(StoreUnavailable, match="maxmemory"):
            await writer.flush()
    finally:
        await store.client.config_set("maxmemory", "0")
    assert await totals(store) == {}
    await writer.flush()
    assert (await totals(store))["requests"] == "1"
