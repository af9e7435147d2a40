from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from proxy.storage.client_keys import SECRET
from proxy.storage.redis import (
    CHANGED,
    MAX_WHOLE,
    VERSION,
    InvalidRecord,
    Store,
    StoreUnavailable,
    json_object,
    load_script,
)
from router_core.text import rfc3339

log = logging.getLogger("uniroute.audit")

AUDIT: Final = "uniroute:audit"

MAX_LINES: Final = 10_000

ANONYMOUS = "-"
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
class Actor:
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


CLI = Actor("cli")


def action_of(method: str, path: str) -> tuple[str, str]:
    """The action that a call on the admin side asks for, and its target; of a call that we do not have, its words."""
    for known, pattern, action in _ACTIONS:
        if method == known and (found := pattern.fullmatch(path)):
            return action, found[1]
    return method if re.fullmatch("[A-Z]{1,20}", method) else "?", path


class AuditTrail:
    """The lines in the store, the last 10,000. Those of the registry are written by the scripts that change it."""

    def __init__(self, store: Store, author: Actor) -> None:
        self._store = store
        self._author = author

    async def note(self, action: str, target: str) -> None:
        """Of a change that is not the registry's and that took place, so the store's silence cannot undo it."""
        stored = {"line": self._author.line(action, target)}
        try:
            async with self._store.asking("write the audit line") as client:
                await client.xadd(AUDIT, stored, maxlen=MAX_LINES, approximate=False)  # type: ignore[arg-type]
        except StoreUnavailable as error:
            log.warning("the line of %s is in this log alone: %s", action, error)

    async def latest(self, count: int) -> list[dict[str, Any]]:
        """Newest first. Raises StoreUnavailable."""
        async with self._store.asking("read the audit lines") as client:
            found: Any = await client.xrevrange(AUDIT, count=count)
        return [_shown(place, kept) for place, kept in found]


def _shown(place: str, kept: Mapping[str, str]) -> dict[str, Any]:
    at = rfc3339(min(int(place.partition("-")[0]), LAST_MS) / 1000, "milliseconds")
    try:
        line = json_object(kept.get("line", ""))
    except InvalidRecord:
        line = {"who": "?", "action": "?", "target": "?", "outcome": "a line that is not ours", "request": None}
    return {**line, "at": at}


MAX_DIGITS: Final = len(str(MAX_WHOLE)) - 1

# Comes before every script that changes what is registered.
ANNOUNCED: Final = load_script(
    __package__, "audit", CHANGED=CHANGED, MAX_DIGITS=MAX_DIGITS, MAX_LINES=MAX_LINES, MAX_WHOLE=MAX_WHOLE
)


# Of a write that may have been done although nobody was told: what is to be done about it.
_IN_DOUBT: Final = {
    CREATE_KEY: "nobody was shown its secret: where GET /admin/keys lists the id {target}, revoke it",
    ROTATE_KEY: "nobody was shown the new secret, and the old one may open no more: rotate it again",
    ADD_MODEL: "GET /admin/models/{target} shows whether it is; repeat the request where it is not",
    REMOVE_MODEL: "repeat the request, and a 404 says that it was",
}

_REPEAT: Final = "repeat the request, which does no harm"


@dataclass(frozen=True)
class Step:
    """Another script that is run within a write: both are done, or neither."""

    script: str
    keys: tuple[str, ...]
    arguments: tuple[Any, ...]


class AuditedScript:
    """Writes for an author; without one, for the service itself, which leaves no audit line."""

    def __init__(self, store: Store, author: Actor | None = None) -> None:
        self.store = store
        self._author = author

    async def run(self, what: str, script: str, keys: list[str], arguments: list[str], act: tuple[str, str]) -> int:
        """The script's answer: the new version, or a negative number that says why nothing was changed.

        Args:
            what: completes "could not …".
            act: action and target, for the audit line.

        Raises:
            StoreUnavailable: it may have been run or not; all our scripts may be run again.
        """
        line = self._author.line(*act) if self._author else ""
        keys = [VERSION, *keys, AUDIT]
        return int(await self._run(what, ANNOUNCED + script, keys, [*arguments, line], act))

    async def run_with(
        self, step: Step, what: str, script: str, keys: list[str], arguments: list[str], act: tuple[str, str]
    ) -> tuple[int, str]:
        """As `run`, with a step that is done where the script changes something; and what the step answers."""
        line = self._author.line(*act) if self._author else ""
        own_keys, own_arguments = [VERSION, *keys, AUDIT], [*arguments, line]
        counts = {"WRITE_KEYS": len(own_keys), "WRITE_ARGUMENTS": len(own_arguments)}
        write = f"local function write(KEYS, ARGV)\n{ANNOUNCED}{script}end\n"
        follow = f"local function step(KEYS, ARGV)\n{step.script}end\n"
        whole = write + follow + load_script(__package__, "write_with_step", **counts)
        every_key, every_argument = [*own_keys, *step.keys], [*own_arguments, *step.arguments]
        version, answer = await self._run(what, whole, every_key, every_argument, act)
        return int(version), str(answer)

    async def _run(self, what: str, script: str, keys: list[str], arguments: list[Any], act: tuple[str, str]) -> Any:
        try:
            return await self.store.run_durably(what, script, keys, arguments)
        except StoreUnavailable as error:
            if not error.in_doubt:
                raise
            action, target = act
            advice = _IN_DOUBT.get(action, _REPEAT).format(target=target)
            raise StoreUnavailable(f"{error}. It may have been done all the same: {advice}") from error.__cause__
