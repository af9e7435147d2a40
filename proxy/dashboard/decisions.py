"""Where the page gets its decisions from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from proxy.server.dependencies import AppState

# Rows of the list on the first view.
MAX_LATEST = 20


class DecisionSource:
    """Decisions that are kept. None are, so far: the list of the first view and the drawer of a row read this."""

    async def latest(self, state: AppState, limit: int = MAX_LATEST) -> Sequence[Mapping[str, Any]]:  # noqa: ARG002
        """Return the newest decisions, the newest first: at, id, model, reason, ending, cost_usd, seconds."""
        return ()
