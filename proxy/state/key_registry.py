"""Client keys in the store: made, changed, rotated, revoked, each compared and set in one step. Who may is auth."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from proxy.state.audit import CHANGE_KEY, CREATE_KEY, REVOKE_KEY, ROTATE_KEY
from proxy.state.client_keys import ClientKey, KeyChange
from proxy.state.keys import KeyLatch, digest_of, new_secret
from proxy.state.registry_errors import ChangedMeanwhile, KeyIsOver, UnknownKey
from proxy.state.stored import KEYS
from proxy.state.stored_json import InvalidRecord
from proxy.state.writer import Writer

# ARGV: id, the record that the change was made from or nothing, the record. A script that is run again finds its own
# work done; where nothing changes there is no telling, and one line too many is the lesser evil.
_PUT_KEY = """
local stored = redis.call('HGET', KEYS[2], ARGV[1]) or ''
if stored == ARGV[3] and ARGV[2] ~= ARGV[3] then return tonumber(version_now()) end
if stored ~= ARGV[2] then return -1 end
local version = changed()
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
return version
"""
_ATTEMPTS = 20
_UNCHANGED = KeyChange()


class KeyRegistry:
    """Acknowledged is stored. Every method raises StoreUnavailable when it is not."""

    def __init__(self, writer: Writer, latch: KeyLatch, clock: Callable[[], float] = time.time) -> None:
        self._writer = writer
        self._latch = latch
        self._clock = clock

    async def create(
        self, name: str, models: tuple[str, ...] | None = None, stated: KeyChange = _UNCHANGED
    ) -> tuple[ClientKey, str]:
        """A new client key and its secret, which is shown once. From now on every call needs one. Raises InvalidKey."""
        secret = new_secret()
        key = stated.of(ClientKey(uuid.uuid4().hex[:12], name, digest_of(secret), self._clock(), models))
        await self._put("store a key", "", key, CREATE_KEY)
        self._latch.close()
        return key, secret

    async def change(self, key_id: str, stated: KeyChange) -> ClientKey:
        """Raises UnknownKey, KeyIsOver, ChangedMeanwhile, InvalidKey."""
        return await self._replace(key_id, lambda key: stated.of(_living(key)), CHANGE_KEY)

    async def rotate(self, key_id: str, grace_s: float = 0.0) -> tuple[ClientKey, str]:
        """A new secret, shown once. The one before opens for `grace_s` seconds more, any earlier one no longer.

        Raises:
            UnknownKey, KeyIsOver, ChangedMeanwhile.
        """
        secret = new_secret()

        def rotated(key: ClientKey) -> ClientKey:
            now = self._clock()
            if _living(key).expired(now):
                raise KeyIsOver(f"the key {key_id!r} has expired; move its expiry before you rotate it")
            old, until = (key.digest, now + grace_s) if grace_s > 0 else (None, None)
            return replace(key, digest=digest_of(secret), previous_digest=old, previous_until=until)

        return await self._replace(key_id, rotated, ROTATE_KEY), secret

    async def revoke(self, key_id: str) -> ClientKey:
        """For good. Raises UnknownKey, ChangedMeanwhile. Revoking twice is once."""
        over = {"revoked": True, "previous_digest": None, "previous_until": None}
        return await self._replace(key_id, lambda key: replace(key, **cast(Any, over)), REVOKE_KEY)

    async def find(self, key_id: str) -> ClientKey:
        """Raises UnknownKey."""
        return (await self._stored(key_id))[1]

    async def listed(self) -> tuple[ClientKey, ...]:
        """Oldest first, the revoked among them. An entry that cannot be read is left out: it opens nothing either."""
        async with self._writer.store.asking("list the keys") as client:
            stored = cast(dict[str, str], await client.hgetall(KEYS))
        return tuple(sorted(_readable_keys(stored), key=lambda key: key.created_at))

    async def _replace(self, key_id: str, change: Callable[[ClientKey], ClientKey], action: str) -> ClientKey:
        for _ in range(_ATTEMPTS):
            before, key = await self._stored(key_id)
            changed = change(key)
            if await self._put("change a key", before, changed, action) >= 0:
                return changed
        raise ChangedMeanwhile(f"the key {key_id!r} is being changed by others all the time; repeat the request")

    async def _put(self, what: str, before: str, key: ClientKey, action: str) -> int:
        return await self._writer.run(what, _PUT_KEY, [KEYS], [key.id, before, key.to_json()], (action, key.id))

    async def _stored(self, key_id: str) -> tuple[str, ClientKey]:
        """As text, which is what is compared, and read."""
        async with self._writer.store.asking("read a key") as client:
            text = cast(str | None, await client.hget(KEYS, key_id))
        if text is None:
            raise UnknownKey(f"no client key has the id {key_id[:60]!r}")
        try:
            return text, ClientKey.from_json(key_id, text)
        except InvalidRecord as error:
            raise UnknownKey(
                f"the record of the key {key_id!r} cannot be read, so it opens nothing: {error}"
            ) from error


def _living(key: ClientKey) -> ClientKey:
    if key.revoked:
        raise KeyIsOver(f"the key {key.id!r} is revoked for good; make another one")
    return key


def _readable_keys(stored: dict[str, str]) -> list[ClientKey]:
    keys = []
    for key_id, text in stored.items():
        try:
            keys.append(ClientKey.from_json(key_id, text))
        except InvalidRecord:
            continue
    return keys
