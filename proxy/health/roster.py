"""Forgetting the health of models that were removed or changed, whichever process an administrator told it to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from proxy.health.health import ModelHealth
from proxy.storage.models import ModelRecord

LOOK_S = 0.5


class Roster:
    """`known`: the registered models, another mapping whenever one of them is another."""

    def __init__(self, health: ModelHealth, known: Callable[[], Mapping[str, ModelRecord]]) -> None:
        self._health = health
        self._known = known
        self._seen = known()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        seen, self._seen = self._seen, self._known()
        if seen is self._seen:
            return
        for name, record in seen.items():
            now = self._seen.get(name)
            if now is None or now.litellm_params != record.litellm_params:
                self._health.forget(name, from_elsewhere=True)
