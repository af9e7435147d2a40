"""Every write to models, prices and profiles: one atomic script. Keys are key_registry, reads stored."""

from __future__ import annotations

import time
from collections.abc import Collection

from proxy.state.audit import ADD_MODEL, CHANGE_MODEL, PRICE_MODEL, PROFILE_MODEL, REMOVE_MODEL, Author
from proxy.state.key_registry import KeyRegistry
from proxy.state.keys import KeyLatch
from proxy.state.records import LivePrice, ModelRecord, StoredProfile
from proxy.state.registry_errors import (
    ChangedMeanwhile,
    DefinedInConfig,
    KeyIsOver,
    NameTaken,
    RegistryError,
    UnknownKey,
    UnknownModel,
)
from proxy.state.store import Store
from proxy.state.stored import EARLIER, MODELS, PRICING, PROFILES, price_key
from proxy.state.writer import Step, Writer
from router_core.profiles import Profile
from router_core.types import Price

__all__ = [
    "ChangedMeanwhile",
    "DefinedInConfig",
    "KeyIsOver",
    "NameTaken",
    "Registry",
    "RegistryError",
    "UnknownKey",
    "UnknownModel",
]

_ADD_MODEL = """
local stored = redis.call('HGET', KEYS[2], ARGV[1])
if stored and stored ~= ARGV[2] then return -1 end
local version = changed()
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
if ARGV[3] ~= '' then
  redis.pcall('HDEL', KEYS[4], ARGV[1])
  redis.call('HSET', KEYS[3], ARGV[1], ARGV[3])
end
return version
"""
# ARGV: name, record, and where it matters the version that the record was made from.
_UPDATE_MODEL = """
if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 0 then return -1 end
if ARGV[3] ~= '' and version_now() ~= ARGV[3] then return -2 end
local version = changed()
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
return version
"""
_REMOVE_MODEL = """
if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 0 then return -1 end
local version = changed()
redis.call('HDEL', KEYS[2], ARGV[1])
redis.pcall('HDEL', KEYS[3], ARGV[1])
redis.pcall('HDEL', KEYS[4], ARGV[1])
redis.call('DEL', KEYS[5])
return version
"""
# ARGV: name, "1" if configured, "1" if a price that somebody stated stays, then the fields, and the line at the end.
_PUT_PRICE = f"""
if ARGV[2] ~= '1' and redis.call('HEXISTS', KEYS[2], ARGV[1]) == 0 then return -1 end
if ARGV[3] == '1' and redis.call('EXISTS', KEYS[3]) == 1 and redis.pcall('HGET', KEYS[3], 'source') ~= 'sync' then
  return -2
end
local version = changed()
redis.call('DEL', KEYS[3])
redis.call('HSET', KEYS[3], unpack(ARGV, 4, #ARGV - 1))
redis.call('PUBLISH', '{PRICING}', ARGV[1])
return version
"""
_PUT_PROFILE = """
if ARGV[2] ~= '1' and redis.call('HEXISTS', KEYS[2], ARGV[1]) == 0 then return -1 end
local version = changed()
redis.pcall('HDEL', KEYS[4], ARGV[1])
redis.call('HSET', KEYS[3], ARGV[1], ARGV[3])
return version
"""


class Registry:
    """Acknowledged is stored. Every method raises StoreUnavailable when it is not; most return the new version."""

    def __init__(
        self, store: Store, configured: Collection[str], latch: KeyLatch, author: Author | None = None
    ) -> None:
        self._store = store
        self._configured = frozenset(configured)
        self._latch = latch
        self._writer = Writer(store, author)
        self.keys = KeyRegistry(self._writer, latch)

    def by(self, author: Author) -> Registry:
        """The same, with an audit line in the author's name for each write."""
        return Registry(self._store, self._configured, self._latch, author)

    async def add_model(self, record: ModelRecord, profile: Profile | None = None) -> int:
        """With its profile, or neither. Raises NameTaken. Adding the very same record twice is once."""
        entry = "" if profile is None else StoredProfile(record.fingerprint, profile).to_json()
        version = await self._writer.run("add a model", *self._addition(record, entry))
        return self._added(record, version)

    async def add_model_with(self, record: ModelRecord, step: Step) -> tuple[int, str]:
        """With what else is written for it, or neither; and what that answers. Raises NameTaken."""
        version, answer = await self._writer.run_with(step, "add a model", *self._addition(record, ""))
        return self._added(record, version), answer

    def _addition(self, record: ModelRecord, entry: str) -> tuple[str, list[str], list[str], tuple[str, str]]:
        if record.name in self._configured:
            raise NameTaken(f"the model {record.name!r} is defined in the configuration file")
        arguments = [record.name, _readable(record), entry]
        return _ADD_MODEL, [MODELS, PROFILES, EARLIER], arguments, (ADD_MODEL, record.name)

    def _added(self, record: ModelRecord, version: int) -> int:
        if version < 0:
            raise NameTaken(
                f"a model named {record.name!r} exists; PATCH changes it, DELETE removes it, POST …/profile measures it"
            )
        return version

    async def update_model(self, record: ModelRecord, *, as_of: int | None = None) -> int:
        """Replace the record of this name.

        Args:
            as_of: refuse if anything was written since this version.

        Raises:
            UnknownModel, DefinedInConfig, ChangedMeanwhile.
        """
        self._not_configured(record.name)
        arguments = [record.name, _readable(record), "" if as_of is None else str(as_of)]
        act = CHANGE_MODEL, record.name
        version = await self._writer.run("change a model", _UPDATE_MODEL, [MODELS], arguments, act)
        if version == -2:
            raise ChangedMeanwhile(f"the model {record.name!r} may have been changed since version {as_of}")
        return self._known(record.name, version)

    async def remove_model(self, name: str) -> int:
        """Its profile and price go with it. Raises UnknownModel or DefinedInConfig."""
        self._not_configured(name)
        keys = [MODELS, PROFILES, EARLIER, price_key(name)]
        version = await self._writer.run("remove a model", _REMOVE_MODEL, keys, [name], (REMOVE_MODEL, name))
        return self._known(name, version)

    async def put_price(self, name: str, price: Price, source: str = "admin") -> int | None:
        """Replace the whole price. None: `source` is sync and somebody else's price stays. Raises UnknownModel."""
        stated = LivePrice(price, source, time.time()).to_fields()
        pairs = [word for pair in stated.items() for word in pair]
        arguments = [name, self._flag(name), "1" if source == "sync" else "0", *pairs]
        keys = [MODELS, price_key(name)]
        version = await self._writer.run("store a price", _PUT_PRICE, keys, arguments, (PRICE_MODEL, name))
        return None if version == -2 else self._known(name, version)

    async def put_profile(self, record: ModelRecord, profile: Profile) -> int:
        """Store a profile of this model as it is now. Raises UnknownModel."""
        entry = StoredProfile(record.fingerprint, profile).to_json()
        arguments = [record.name, self._flag(record.name), entry]
        keys, act = [MODELS, PROFILES, EARLIER], (PROFILE_MODEL, record.name)
        version = await self._writer.run("store a profile", _PUT_PROFILE, keys, arguments, act)
        return self._known(record.name, version)

    def _flag(self, name: str) -> str:
        return "1" if name in self._configured else "0"

    def _not_configured(self, name: str) -> None:
        if name in self._configured:
            raise DefinedInConfig(f"the model {name!r} is defined in the configuration file; change it there")

    def _known(self, name: str, version: int) -> int:
        if version < 0:
            raise UnknownModel(f"no model named {name!r} is registered")
        return version


def _readable(record: ModelRecord) -> str:
    """As it is stored. Raises InvalidRecord for what could be stored and then not be read: half a character, say."""
    text = record.to_json()
    ModelRecord.from_json(record.name, text)
    return text
