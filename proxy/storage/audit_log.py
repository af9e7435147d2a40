from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from proxy.storage.client_keys import SECRET
from proxy.storage.records import MAX_INTEGER, InvalidRecord, json_object
from proxy.storage.redis import CHANGED, VERSION, Store, StoreUnavailable, load_script
from router_core.text import rfc3339

log = logging.getLogger("uniroute.audit")

AUDIT: Final = "uniroute:audit"

MAX_LINES: Final = 10_000

# A request without a key of ours.
ANONYMOUS = "-"

ROOT = "root"

CREATE_KEY, CHANGE_KEY, ROTATE_KEY, REVOKE_KEY = "keys.create", "keys.change", "keys.rotate", "keys.revoke"

ADD_MODEL, CHANGE_MODEL, REMOVE_MODEL = "models.add", "models.change", "models.remove"

PAUSE_MODEL, RESUME_MODEL = "models.pause", "models.resume"

CHANGE_SETTINGS, RESET_SETTINGS = "settings.change", "settings.reset"

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
        ("PUT", r"/admin/settings()", CHANGE_SETTINGS),
        ("DELETE", r"/admin/settings()", RESET_SETTINGS),
    )
)

MAX_TARGET_CHARS = 200

# The end of the year 9999. An entry may have any number as its time.
MAX_UNIX_MS: Final = 253_402_300_799_000


@dataclass(frozen=True, slots=True)
class Actor:
    """Who changes something, and in which request.

    The id is `root` for the environment's admin key, the id of a client key, or `cli`.
    """

    id: str
    request_id: str | None = None

    def line(self, action: str, target: str) -> str:
        """Return the audit line of a change that took place."""
        return json.dumps(
            {"who": self.id, "action": action, "target": target, "outcome": "done", "request": self.request_id}
        )

    def log(self, action: str, target: str, outcome: object) -> None:
        """Log one line. Nothing that a caller wrote can end the line, and a key in a URL is masked."""
        shown = SECRET.sub("***", quote(target, safe="/:@", errors="replace"))[:MAX_TARGET_CHARS] or "-"
        fields = {"who": self.id, "action": action, "target": shown, "outcome": outcome, "request": self.request_id}
        facts = " ".join(f"{name}={'-' if value is None else value}" for name, value in fields.items())
        log.info("%s", facts, extra={"fields": fields})


CLI = Actor("cli")


def action_of(method: str, path: str) -> tuple[str, str]:
    """Return the action and the target of a call to the admin API; of an unknown call, its method and path."""
    for known, pattern, action in _ACTIONS:
        if method == known and (found := pattern.fullmatch(path)):
            return action, found[1]
    return method if re.fullmatch("[A-Z]{1,20}", method) else "?", path


class AuditTrail:
    """The last MAX_LINES audit lines in the store. The scripts that change the registry write theirs themselves."""

    def __init__(self, store: Store, actor: Actor) -> None:
        self._store = store
        self._actor = actor

    async def record(self, action: str, target: str) -> None:
        """Write the line of a change that is not the registry's. It took place, so a failure is only logged."""
        stored = {"line": self._actor.line(action, target)}
        try:
            async with self._store.operation("write the audit line") as client:
                await client.xadd(AUDIT, stored, maxlen=MAX_LINES, approximate=False)  # type: ignore[arg-type]
        except StoreUnavailable as error:
            log.warning("the line of %s is in this log alone: %s", action, error)

    async def latest(self, count: int) -> list[dict[str, Any]]:
        """Return the newest lines, the newest first. Raise StoreUnavailable."""
        async with self._store.operation("read the audit lines") as client:
            found: Any = await client.xrevrange(AUDIT, count=count)
        return [_shown(place, kept) for place, kept in found]


def _shown(place: str, kept: Mapping[str, str]) -> dict[str, Any]:
    at = rfc3339(min(int(place.partition("-")[0]), MAX_UNIX_MS) / 1000, "milliseconds")
    try:
        line = json_object(kept.get("line", ""))
    except InvalidRecord:
        line = {"who": "?", "action": "?", "target": "?", "outcome": "a line that is not ours", "request": None}
    return {**line, "at": at}


MAX_DIGITS: Final = len(str(MAX_INTEGER)) - 1

# Comes before every script that changes what is registered.
ANNOUNCED: Final = load_script(
    __package__, "audit", CHANGED=CHANGED, MAX_DIGITS=MAX_DIGITS, MAX_LINES=MAX_LINES, MAX_INTEGER=MAX_INTEGER
)


# What to do about a write that may have been done although no answer came.
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
    """Run scripts that change what is registered, with an audit line for their actor.

    Without an actor, the service itself writes, which leaves no line.
    """

    def __init__(self, store: Store, actor: Actor | None = None) -> None:
        self.store = store
        self._actor = actor

    @property
    def who(self) -> str | None:
        """Return the id of the actor."""
        return self._actor.id if self._actor else None

    async def run(self, what: str, script: str, keys: list[str], arguments: list[str], act: tuple[str, str]) -> int:
        """Run a script; return the new version, or the negative number that says why nothing was changed.

        Args:
            what: completes "could not …".
            act: action and target, for the audit line.

        Raises:
            StoreUnavailable: it may have been run or not; all our scripts may be run again.
        """
        line = self._actor.line(*act) if self._actor else ""
        keys = [VERSION, *keys, AUDIT]
        return int(await self._run(what, ANNOUNCED + script, keys, [*arguments, line], act))

    async def run_with(
        self, step: Step, what: str, script: str, keys: list[str], arguments: list[str], act: tuple[str, str]
    ) -> tuple[int, str]:
        """Do what `run` does and, if the script changes something, a step; return also what the step answers."""
        line = self._actor.line(*act) if self._actor else ""
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
