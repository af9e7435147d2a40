"""Who changed what: the line of each write of an administrator, in the log and in the store. Never a secret in it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import quote

from proxy.state.keys import SECRET
from proxy.state.store import Store, StoreUnavailable
from proxy.state.stored_json import InvalidRecord, json_object

log = logging.getLogger("uniroute.audit")

AUDIT: Final = "uniroute:audit"
MOST_LINES: Final = 10_000
NOBODY = "-"
"""Whoever it was, no key of ours was shown."""
ROOT = "root"
CREATE_KEY, CHANGE_KEY, ROTATE_KEY, REVOKE_KEY = "keys.create", "keys.change", "keys.rotate", "keys.revoke"
ADD_MODEL, CHANGE_MODEL, REMOVE_MODEL = "models.add", "models.change", "models.remove"
PROFILE_MODEL, PRICE_MODEL, CANCEL_JOB = "models.profile", "models.price", "jobs.cancel"
_ACTIONS = tuple(
    (method, re.compile(path, re.DOTALL), action)
    for method, path, action in (
        ("POST", r"/admin/keys()", CREATE_KEY),
        ("POST", r"/admin/keys/(.+)/rotate", ROTATE_KEY),
        ("PATCH", r"/admin/keys/(.+)", CHANGE_KEY),
        ("DELETE", r"/admin/keys/(.+)", REVOKE_KEY),
        ("POST", r"/admin/models()", ADD_MODEL),
        ("POST", r"/admin/models/(.+)/profile", PROFILE_MODEL),
        ("PUT", r"/admin/models/(.+)/pricing", PRICE_MODEL),
        ("PATCH", r"/admin/models/(.+)", CHANGE_MODEL),
        ("DELETE", r"/admin/models/(.+)", REMOVE_MODEL),
        ("DELETE", r"/admin/jobs/(.+)", CANCEL_JOB),
    )
)
_SHOWN = 200
LAST_MS: Final = 253_402_300_799_000
"""The end of the year 9999. An entry may be given any number as its time."""


@dataclass(frozen=True, slots=True)
class Author:
    """Who writes: `root` (the environment's admin key), the id of a key, or `cli`; and in which request."""

    who: str
    request_id: str | None = None

    def line(self, action: str, target: str) -> str:
        """What the store keeps of a change that took place."""
        return json.dumps(
            {"who": self.who, "action": action, "target": target, "outcome": "done", "request": self.request_id}
        )

    def log(self, action: str, target: str, outcome: object) -> None:
        """One line whatever a caller wrote: nothing of it can end the line, and a key put in a URL is masked."""
        shown = SECRET.sub("***", quote(target, safe="/:@", errors="replace"))[:_SHOWN] or "-"
        log.info(
            "who=%s action=%s target=%s outcome=%s request=%s", self.who, action, shown, outcome, self.request_id or "-"
        )


CLI = Author("cli")


def act_of(method: str, path: str) -> tuple[str, str]:
    """The action that a call on the admin side asks for, and its target; of a call that we do not have, its words."""
    for known, pattern, action in _ACTIONS:
        if method == known and (found := pattern.fullmatch(path)):
            return action, found[1]
    return method if re.fullmatch("[A-Z]{1,20}", method) else "?", path


class AuditTrail:
    """The lines in the store, the last 10,000. Those of the registry are written by the scripts that change it."""

    def __init__(self, store: Store, author: Author) -> None:
        self._store = store
        self._author = author

    async def note(self, action: str, target: str) -> None:
        """Of a change that is not the registry's and that took place, so the store's silence cannot undo it."""
        stored = {"line": self._author.line(action, target)}
        try:
            async with self._store.asking("write the audit line") as client:
                await client.xadd(AUDIT, stored, maxlen=MOST_LINES, approximate=False)  # type: ignore[arg-type]
        except StoreUnavailable as error:
            log.warning("the line of %s is in this log alone: %s", action, error)

    async def latest(self, count: int) -> list[dict[str, Any]]:
        """Newest first. Raises StoreUnavailable."""
        async with self._store.asking("read the audit lines") as client:
            found: Any = await client.xrevrange(AUDIT, count=count)
        return [_shown(place, kept) for place, kept in found]


def _shown(place: str, kept: Mapping[str, str]) -> dict[str, Any]:
    at = datetime.fromtimestamp(min(int(place.partition("-")[0]), LAST_MS) / 1000, UTC).isoformat(
        timespec="milliseconds"
    )
    try:
        line = json_object(kept.get("line", ""))
    except InvalidRecord:
        line = {"who": "?", "action": "?", "target": "?", "outcome": "a line that is not ours", "request": None}
    return {**line, "at": at.replace("+00:00", "Z")}
