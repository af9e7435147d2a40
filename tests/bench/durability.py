"""Measure what it costs to acknowledge only what is on disk: `python -m tests.bench.durability`.

Single writes one after the other, as an admin's are, and batches of usage, with `appendfsync always` (ours) and
`everysec`.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from proxy.cli import console
from proxy.settings.schema import Settings
from proxy.storage.client_keys import AuthRequiredLatch
from proxy.storage.redis import Store
from proxy.storage.registry import Registry
from proxy.storage.usage import UsageRecord
from proxy.storage.usage_journal import JournalDirectory
from proxy.storage.usage_writer import BATCH_SIZE, UsageWriter
from router_core.types import Price

RECORD = UsageRecord("dec-0", 1.8e9, "small", "key-1", "scored", "complete", 1000, 400, 300, None, 0.0123, 1.5, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--writes", type=int, default=300)
    parser.add_argument("--data-dir", type=Path, help="on the disk that is asked about; a temporary folder if not set")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="uniroute-bench-", dir=options.data_dir) as folder:
        asyncio.run(measure(Path(folder), options.writes))


async def measure(folder: Path, writes: int) -> None:
    store = await Store.open(Settings(data_dir=folder))
    registry = Registry(store, ("small",), AuthRequiredLatch(folder))
    recorder = UsageWriter(store, JournalDirectory(folder / "usage", 10**9))
    rows = []

    async def put_price() -> object:
        return await registry.put_price("small", Price(1e-6, 4e-6))

    async def flush() -> None:
        for _ in range(BATCH_SIZE):
            recorder.record(RECORD)
        await recorder.flush()

    for policy in ("always", "everysec", "always", "everysec"):
        await store.client.config_set("appendfsync", policy)
        for name, operation in (("an admin's write", put_price), (f"a batch of {BATCH_SIZE} usage records", flush)):
            taken = await timed(operation, writes)
            median = statistics.median(taken)
            rows.append((policy, name, f"{median * 1000:.2f} ms", f"{len(taken) / sum(taken):.0f}"))
    await store.close()
    console.table(("appendfsync", "what", "median", "a second"), rows, title=f"{writes} of each, one after the other")


async def timed(operation: Callable[[], Awaitable[object]], times: int) -> list[float]:
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        await operation()
        taken.append(time.perf_counter() - started)
    return taken


if __name__ == "__main__":
    main()
