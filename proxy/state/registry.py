"""Every write to models, prices, profiles and keys: one atomic script, a new version, a message. Reads are stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection
from dataclasses import replace
from typing import Any, cast

from redis.asyncio import Redis

from proxy.state.keys import KeyLatch, digest_of, new_secret
from proxy.state.records import ClientKey, InvalidRecord, LivePrice, ModelRecord, StoredProfile
from proxy.state.store import Store
from proxy.state.stored import CHANGED, EARLIER, KEYS, MODELS, PRICING, PROFILES, VERSION, price_key
from router_core.profiles import Profile
from router_core.types import Price

# KEYS[1] is always the version. It moves first: a script that fails midway has then changed nothing but a number.
_CHANGED = f"""
local function changed()
  local version = redis.call('INCR', KEYS[1])
  redis.call('PUBLISH', '{CHANGED}', version)
  return version
end
"""
_ADD_MODEL = f"""{_CHANGED}
local stored = redis.call('HGET', KEYS[2], ARGV[1])
if stored and stored ~= ARGV[2] then return -1 end
local version = changed()
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
return version
"""
# ARGV: name, record, and where it matters the version that the record was made from.
_UPDATE_MODEL = f"""{_CHANGED}
if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 0 then return -1 end
if ARGV[3] ~= '' and (redis.call('GET', KEYS[1]) or '0') ~= ARGV[3] then return -2 end
local version = changed()
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
return version
"""
_REMOVE_MODEL = f"""{_CHANGED}
if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 0 then return -1 end
local version = changed()
redis.call('HDEL', KEYS[2], ARGV[1])
redis.pcall('HDEL', KEYS[3], ARGV[1])
redis.pcall('HDEL', KEYS[4], ARGV[1])
redis.call('DEL', KEYS[5])
return version
"""
# ARGV: name, "1" if configured, "1" if a price that somebody stated stays, then the fields.
_PUT_PRICE = f"""{_CHANGED}
if ARGV[2] ~= '1' and redis.call('HEXISTS', KEYS[2], ARGV[1]) == 0 then return -1 end
if ARGV[3] == '1' and redis.call('EXISTS', KEYS[3]) == 1 and redis.pcall('HGET', KEYS[3], 'source') ~= 'sync' then
  return -2
end
local version = changed()
redis.call('DEL', KEYS[3])
redis.call('HSET', KEYS[3], unpack(ARGV, 4))
redis.call('PUBLISH', '{PRICING}', ARGV[1])
return version
"""
_PUT_PROFILE = f"""{_CHANGED}
if ARGV[2] ~= '1' and redis.call('HEXISTS', KEYS[2], ARGV[1]) == 0 then return -1 end
local version = changed()
redis.pcall('HDEL', KEYS[4], ARGV[1])
redis.call('HSET', KEYS[3], ARGV[1], ARGV[3])
return version
"""
_PUT_KEY = f"""{_CHANGED}
local version = changed()
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
return version
"""


class RegistryError(Exception):
    """A write that the registry refuses; nothing was changed."""


class NameTaken(RegistryError):
    """A model of this name exists."""


class UnknownModel(RegistryError):
    """No model of this name is registered."""


class ChangedMeanwhile(RegistryError):
    """What is stored is no longer what the change was made from."""


class DefinedInConfig(RegistryError):
    """The model is the configuration file's to change."""


class UnknownKey(RegistryError):
    """No client key has this id."""


class Registry:
    """Acknowledged is stored. Every method raises StoreUnavailable when it is not; most return the new version."""

    def __init__(self, store: Store, configured: Collection[str], latch: KeyLatch) -> None:
        self._store = store
        self._configured = frozenset(configured)
        self._latch = latch

    async def add_model(self, record: ModelRecord) -> int:
        """Raises NameTaken. Adding the very same record twice is once."""
        if record.name in self._configured:
            raise NameTaken(f"the model {record.name!r} is defined in the configuration file")
        version = await self._write("add a model", _ADD_MODEL, [MODELS], [record.name, record.to_json()])
        if version < 0:
            raise NameTaken(f"a model named {record.name!r} exists; PATCH changes it, DELETE removes it")
        return version

    async def update_model(self, record: ModelRecord, *, as_of: int | None = None) -> int:
        """Replace the record of this name.

        Args:
            as_of: refuse if anything was written since this version.

        Raises:
            UnknownModel, DefinedInConfig, ChangedMeanwhile.
        """
        self._not_configured(record.name)
        arguments = [record.name, record.to_json(), "" if as_of is None else str(as_of)]
        version = await self._write("change a model", _UPDATE_MODEL, [MODELS], arguments)
        if version == -2:
            raise ChangedMeanwhile(f"the model {record.name!r} may have been changed since version {as_of}")
        return self._known(record.name, version)

    async def remove_model(self, name: str) -> int:
        """Its profile and price go with it. Raises UnknownModel or DefinedInConfig."""
        self._not_configured(name)
        keys = [MODELS, PROFILES, EARLIER, price_key(name)]
        return self._known(name, await self._write("remove a model", _REMOVE_MODEL, keys, [name]))

    async def put_price(self, name: str, price: Price, source: str = "admin") -> int | None:
        """Replace the whole price. None: `source` is sync and somebody else's price stays. Raises UnknownModel."""
        stated = LivePrice(price, source, time.time()).to_fields()
        pairs = [word for pair in stated.items() for word in pair]
        arguments = [name, self._flag(name), "1" if source == "sync" else "0", *pairs]
        version = await self._write("store a price", _PUT_PRICE, [MODELS, price_key(name)], arguments)
        return None if version == -2 else self._known(name, version)

    async def put_profile(self, record: ModelRecord, profile: Profile) -> int:
        """Store a profile of this model as it is now. Raises UnknownModel."""
        entry = StoredProfile(record.fingerprint, profile).to_json()
        arguments = [record.name, self._flag(record.name), entry]
        version = await self._write("store a profile", _PUT_PROFILE, [MODELS, PROFILES, EARLIER], arguments)
        return self._known(record.name, version)

    async def create_key(self, name: str, models: tuple[str, ...] | None = None) -> tuple[ClientKey, str]:
        """A new client key and its secret, which is shown once. From now on every call needs a key."""
        secret = new_secret()
        key = ClientKey(uuid.uuid4().hex[:12], name, digest_of(secret), time.time(), models)
        await self._write("store a key", _PUT_KEY, [KEYS], [key.id, key.to_json()])
        self._latch.close()
        return key, secret

    async def revoke_key(self, key_id: str) -> int:
        """Raises UnknownKey. Revoking twice is once."""
        for key in await self.list_keys():
            if key.id == key_id:
                revoked = replace(key, revoked=True).to_json()
                return await self._write("revoke a key", _PUT_KEY, [KEYS], [key_id, revoked])
        raise UnknownKey(f"no client key has the id {key_id!r}")

    async def list_keys(self) -> tuple[ClientKey, ...]:
        """Oldest first, the revoked among them. An entry that cannot be read is left out: it opens nothing either."""
        async with self._store.asking("list the keys") as client:
            stored = cast(dict[str, str], await client.hgetall(KEYS))
        return tuple(sorted(_readable(stored), key=lambda key: key.created_at))

    async def _write(self, what: str, script: str, keys: list[str], arguments: list[str]) -> int:
        async with self._store.asking(what) as client:
            return int(await _run(client, script, [VERSION, *keys], arguments))

    def _flag(self, name: str) -> str:
        return "1" if name in self._configured else "0"

    def _not_configured(self, name: str) -> None:
        if name in self._configured:
            raise DefinedInConfig(f"the model {name!r} is defined in the configuration file; change it there")

    def _known(self, name: str, version: int) -> int:
        if version < 0:
            raise UnknownModel(f"no model named {name!r} is registered")
        return version


async def _run(client: Redis, script: str, keys: list[str], arguments: list[str]) -> Any:
    return await client.register_script(script)(keys=keys, args=arguments)


def _readable(stored: dict[str, str]) -> list[ClientKey]:
    keys = []
    for key_id, text in stored.items():
        try:
            keys.append(ClientKey.from_json(key_id, text))
        except InvalidRecord:
            continue
    return keys
