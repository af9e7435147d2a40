"""One atomic script: a new version, a message, the audit line of whoever asked for it. Which scripts, others say."""

from __future__ import annotations

from typing import Final

from proxy.state.audit import AUDIT, MOST_LINES, Author
from proxy.state.store import Store
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
        return int(await self.store.run_durably(what, ANNOUNCED + script, keys, [*arguments, line]))
