"""Run one process that works on jobs until it is killed. Arguments: data directory, address of the model server."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from proxy.storage.redis import Store
from tests.support.profiling import a_bench, model_at, settings_for


async def main(folder: Path, url: str) -> None:
    store = await Store.open(settings_for(folder))
    async with a_bench(store, folder, model_at(url), profile={"concurrency": 2}) as bench:
        await bench.jobs.submit("small", 40, 1.0)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
