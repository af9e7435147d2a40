"""`uniroute worker`: measures models for servers that use the same store. Listens nowhere."""

from __future__ import annotations

import asyncio
import logging
import os
import signal

from proxy.opening import open_services
from proxy.settings import Settings

log = logging.getLogger("uniroute.worker")


async def work(settings: Settings) -> None:
    """Until SIGTERM or Ctrl-C; an unfinished job is given back to the others."""
    ended = asyncio.Event()
    for ending in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(ending, ended.set)
    unexposed = settings.model_copy(update={"host": "127.0.0.1"})
    async with open_services(unexposed, os.environ) as services:
        log.info("measuring models for the store at %s", services.store.name)
        await ended.wait()
