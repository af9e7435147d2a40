"""One atomic script: a new version, a message, the audit line of whoever asked for it. Which scripts, others say."""

from __future__ import annotations

from typing import Final

from proxy.state.audit import AUDIT, MOST_LINES, Author
from proxy.state.store import Store
from proxy.state.stored import CHANGED, VERSION

# KEYS[1] is the version, the last of KEYS the audit lines, the last of ARGV the line, or nothing. A script calls this
# before it changes anything: where one fails midway a line says too much, and no change lacks its line.
ANNOUNCED: Final = f"""
local function changed()
  local version = redis.call('INCR', KEYS[1])
  if ARGV[#ARGV] ~= '' then
    redis.call('XADD', KEYS[#KEYS], 'MAXLEN', '{MOST_LINES}', '*', 'line', ARGV[#ARGV])
  end
  redis.call('PUBLISH', '{CHANGED}', version)
  return version
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
