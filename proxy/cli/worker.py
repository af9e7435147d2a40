"""`uniroute worker`: measures models for servers that use the same store. Listens nowhere."""

from __future__ import annotations

import asyncio
import logging
import os
import signal

from proxy.app import open_services
from proxy.settings.schema import Settings

worker_log = logging.getLogger("uniroute.worker")


async def work(settings: Settings) -> None:
    """Until SIGTERM or Ctrl-C; an unfinished job is given back to the others, and a start is not finished."""
    told = asyncio.Event()
    for ending in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(ending, told.set)
    opened = asyncio.Event()
    measuring = asyncio.create_task(_measure(settings, opened, told))
    telling = asyncio.create_task(told.wait())
    await asyncio.wait({measuring, telling}, return_when=asyncio.FIRST_COMPLETED)
    telling.cancel()
    if not opened.is_set():
        measuring.cancel()
    await asyncio.wait({measuring})
    if not measuring.cancelled():
        measuring.result()


async def _measure(settings: Settings, opened: asyncio.Event, told: asyncio.Event) -> None:
    unexposed = settings.model_copy(update={"host": "127.0.0.1"})
    async with open_services(unexposed, os.environ) as services:
        opened.set()
        worker_log.info("measuring models for the store at %s", services.store.name)
        await told.wait()
