"""One atomic script: a new version, a message, the audit line of whoever asked for it. Which scripts, others say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from proxy.state.audit import ADD_MODEL, AUDIT, CREATE_KEY, MOST_LINES, REMOVE_MODEL, ROTATE_KEY, Author
from proxy.state.store import Store, StoreUnavailable
from proxy.state.stored import CHANGED, VERSION
from proxy.state.stored_json import MAX_WHOLE

MAX_DIGITS: Final = len(str(MAX_WHOLE)) - 1

# KEYS[1] is the version, the last of KEYS the audit lines, the last of ARGV the line, or nothing. A script calls this
# before it changes anything: where one fails midway a line says too much, and no change lacks its line.
# A version that is none of ours begins again, beyond any that a process may have counted to.
ANNOUNCED: Final = f"""
local function changed()
  local version = redis.pcall('INCR', KEYS[1])
  if type(version) == 'table' or version < 1 or version > {MAX_WHOLE} then
    version = tonumber(redis.call('TIME')[1])
    redis.call('SET', KEYS[1], version)
  end
  if ARGV[#ARGV] ~= '' then
    redis.call('XADD', KEYS[#KEYS], 'MAXLEN', '{MOST_LINES}', '*', 'line', ARGV[#ARGV])
  end
  redis.call('PUBLISH', '{CHANGED}', version)
  return version
end
local function version_now()
  local version = redis.pcall('GET', KEYS[1])
  local ours = type(version) == 'string' and string.match(version, '^%d+$') and #version <= {MAX_DIGITS}
  return ours and version or '0'
end
"""


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


class Writer:
    """Writes for an author; without one, for the service itself, which leaves no audit line."""

    def __init__(self, store: Store, author: Author | None = None) -> None:
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
        whole = f"""
        local keys, arguments = {len(own_keys)}, {len(own_arguments)}
        local function write(KEYS, ARGV) {ANNOUNCED} {script} end
        local function step(KEYS, ARGV) {step.script} end
        local version = write({{unpack(KEYS, 1, keys)}}, {{unpack(ARGV, 1, arguments)}})
        if version < 0 then return {{version, ''}} end
        return {{version, step({{unpack(KEYS, keys + 1)}}, {{unpack(ARGV, arguments + 1)}})}}
        """
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
