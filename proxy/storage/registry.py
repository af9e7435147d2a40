from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, cast

from proxy.storage.audit_log import (
    ADD_MODEL,
    CHANGE_KEY,
    CHANGE_MODEL,
    CHANGE_SETTINGS,
    CREATE_KEY,
    PAUSE_MODEL,
    PRICE_MODEL,
    PROFILE_MODEL,
    REMOVE_MODEL,
    RESET_SETTINGS,
    RESUME_MODEL,
    REVOKE_KEY,
    ROTATE_KEY,
    Actor,
    AuditedScript,
    Step,
)
from proxy.storage.client_keys import AuthRequiredLatch, ClientKey, KeyChange, digest_of, new_secret
from proxy.storage.controls import LAMBDA, LambdaOverride, Pause
from proxy.storage.profile_history import REMEMBER, ProfileEntry, history_key
from proxy.storage.records import CurrentPrice, InvalidRecord, ModelRecord, StoredProfile
from proxy.storage.redis import (
    KEYS,
    LATEST_JOBS,
    MODELS,
    PAUSED,
    PREVIOUS_PROFILES,
    PRICING,
    PROFILES,
    SETTINGS,
    Store,
    load_script,
    price_key,
)
from router_core.profiles import Profile
from router_core.types import Price


class RegistryError(Exception):
    """The registry refuses a write; nothing was changed."""


class ModelExists(RegistryError):
    """A model of this name exists."""


class UnknownModel(RegistryError):
    """No model of this name is registered."""


class ConflictingWrite(RegistryError):
    """The stored record is no longer the one that the change was made from."""


class ConfiguredModel(RegistryError):
    """The model is defined in the configuration file, and is changed there."""


class EffortOfModel(RegistryError):
    """The name is that of an effort, which is changed and removed with its model."""


class UnknownKey(RegistryError):
    """No client key has this id."""


class KeyInactive(RegistryError):
    """The client key was revoked or has expired."""


_PUT_KEY = load_script(__package__, "put_key")

MAX_ATTEMPTS = 20

_UNCHANGED = KeyChange()


class KeyRegistry:
    """Create, change, rotate and revoke client keys. Every method raises StoreUnavailable if nothing was stored."""

    def __init__(self, writer: AuditedScript, latch: AuthRequiredLatch, clock: Callable[[], float] = time.time) -> None:
        self._writer = writer
        self._latch = latch
        self._clock = clock

    async def create(
        self, name: str, models: tuple[str, ...] | None = None, change: KeyChange = _UNCHANGED
    ) -> tuple[ClientKey, str]:
        """Return a new key and its secret, shown once. Every call needs a key from now on. Raise InvalidKey."""
        secret = new_secret()
        key = change.apply_to(ClientKey(uuid.uuid4().hex[:12], name, digest_of(secret), self._clock(), models))
        await self._put("store a key", "", key, CREATE_KEY)
        self._latch.close()
        return key, secret

    async def change(self, key_id: str, change: KeyChange) -> ClientKey:
        """Change a key. Raise UnknownKey, KeyInactive, ConflictingWrite or InvalidKey."""
        return await self._replace(key_id, lambda key: change.apply_to(_require_active(key)), CHANGE_KEY)

    async def rotate(self, key_id: str, grace_s: float = 0.0) -> tuple[ClientKey, str]:
        """Return a new secret, which is shown once. The one before is valid for `grace_s` seconds more.

        Raises:
            UnknownKey, KeyInactive, ConflictingWrite.
        """
        secret = new_secret()

        def rotated(key: ClientKey) -> ClientKey:
            now = self._clock()
            if _require_active(key).expired(now):
                raise KeyInactive(f"the key {key_id!r} has expired; move its expiry before you rotate it")
            old, until = (key.digest, now + grace_s) if grace_s > 0 else (None, None)
            return replace(key, digest=digest_of(secret), previous_digest=old, previous_until=until)

        return await self._replace(key_id, rotated, ROTATE_KEY), secret

    async def revoke(self, key_id: str) -> ClientKey:
        """Revoke a key for good; again is harmless. Raise UnknownKey or ConflictingWrite."""
        revoked = {"revoked": True, "previous_digest": None, "previous_until": None}
        return await self._replace(key_id, lambda key: replace(key, **cast(Any, revoked)), REVOKE_KEY)

    async def find(self, key_id: str) -> ClientKey:
        """Return a key, or raise UnknownKey."""
        return (await self._stored(key_id))[1]

    async def listed(self) -> tuple[ClientKey, ...]:
        """Return the keys, also revoked ones, the oldest first, without those that cannot be read or used."""
        async with self._writer.store.operation("list the keys") as client:
            stored = cast(dict[str, str], await client.hgetall(KEYS))
        return tuple(sorted(_readable_keys(stored), key=lambda key: key.created_at))

    async def _replace(self, key_id: str, change: Callable[[ClientKey], ClientKey], action: str) -> ClientKey:
        for _ in range(MAX_ATTEMPTS):
            before, key = await self._stored(key_id)
            changed = change(key)
            if await self._put("change a key", before, changed, action) >= 0:
                return changed
        raise ConflictingWrite(f"the key {key_id!r} is being changed by others all the time; repeat the request")

    async def _put(self, what: str, before: str, key: ClientKey, action: str) -> int:
        return await self._writer.run(what, _PUT_KEY, [KEYS], [key.id, before, key.to_json()], (action, key.id))

    async def _stored(self, key_id: str) -> tuple[str, ClientKey]:
        """Return the record as text, which is compared when it is replaced, and parsed."""
        async with self._writer.store.operation("read a key") as client:
            text = cast(str | None, await client.hget(KEYS, key_id))
        if text is None:
            raise UnknownKey(f"no client key has the id {key_id[:60]!r}")
        try:
            return text, ClientKey.from_json(key_id, text)
        except InvalidRecord as error:
            raise UnknownKey(
                f"the record of the key {key_id!r} cannot be read, so it opens nothing: {error}"
            ) from error


def _require_active(key: ClientKey) -> ClientKey:
    if key.revoked:
        raise KeyInactive(f"the key {key.id!r} is revoked for good; make another one")
    return key


def _readable_keys(stored: dict[str, str]) -> list[ClientKey]:
    keys = []
    for key_id, text in stored.items():
        try:
            keys.append(ClientKey.from_json(key_id, text))
        except InvalidRecord:
            continue
    return keys


_ADD_MODEL = REMEMBER + load_script(__package__, "add_model")
_UPDATE_MODEL = load_script(__package__, "update_model")
_REMOVE_MODEL = load_script(__package__, "remove_model")
_PUT_PRICE = load_script(__package__, "put_price", PRICING=PRICING)
_PUT_PROFILE = REMEMBER + load_script(__package__, "put_profile")
_PAUSE_MODEL = load_script(__package__, "pause_model")
_PUT_SETTINGS = load_script(__package__, "put_settings")


class Registry:
    """Write models, prices and profiles. Most methods return the new version.

    Every method raises StoreUnavailable if nothing was stored.
    """

    def __init__(
        self, store: Store, configured: Collection[str], latch: AuthRequiredLatch, actor: Actor | None = None
    ) -> None:
        self._store = store
        self._configured = frozenset(configured)
        self._latch = latch
        self._writer = AuditedScript(store, actor)
        self.keys = KeyRegistry(self._writer, latch)

    def as_actor(self, actor: Actor) -> Registry:
        """Return a registry that writes an audit line of `actor` for each change."""
        return Registry(self._store, self._configured, self._latch, actor)

    async def add_model(self, record: ModelRecord, profile: Profile | None = None, recipe: str | None = None) -> int:
        """Add a model, with its profile or neither; the same record again is harmless. Raise ModelExists.

        Args:
            recipe: the one in use, which the history of profiles tells.
        """
        version = await self._writer.run("add a model", *self._addition(record, profile, recipe))
        return self._added(record, version)

    async def add_model_with(self, record: ModelRecord, step: Step) -> tuple[int, str]:
        """Add a model and run a step, both or neither; return also what the step answers. Raise ModelExists."""
        version, answer = await self._writer.run_with(step, "add a model", *self._addition(record))
        return self._added(record, version), answer

    def _addition(
        self, record: ModelRecord, profile: Profile | None = None, recipe: str | None = None
    ) -> tuple[str, list[str], list[str], tuple[str, str]]:
        if record.name in self._configured:
            raise ModelExists(f"the model {record.name!r} is defined in the configuration file")
        entries = ["", ""] if profile is None else _handed_over(record, profile, recipe)
        keys = [MODELS, PROFILES, PREVIOUS_PROFILES, PAUSED, history_key(record.name)]
        return _ADD_MODEL, keys, [record.name, _readable(record), *entries], (ADD_MODEL, record.name)

    def _added(self, record: ModelRecord, version: int) -> int:
        if version < 0:
            raise ModelExists(
                f"a model named {record.name!r} exists; PATCH changes it, DELETE removes it, POST …/profile measures it"
            )
        return version

    async def update_model(self, record: ModelRecord, *, as_of: int | None = None) -> int:
        """Replace the record of this name.

        Args:
            as_of: refuse if anything was written since this version.

        Raises:
            UnknownModel, ConfiguredModel, ConflictingWrite.
        """
        self._not_configured(record.name)
        arguments = [record.name, _readable(record), "" if as_of is None else str(as_of)]
        act = CHANGE_MODEL, record.name
        version = await self._writer.run("change a model", _UPDATE_MODEL, [MODELS], arguments, act)
        if version == -2:
            raise ConflictingWrite(f"the model {record.name!r} may have been changed since version {as_of}")
        return self._known(record.name, version)

    async def remove_model(self, name: str, efforts: Collection[str] = ()) -> int:
        """Remove a model and its efforts, their profiles, its price, its pause, and which job of it was the latest.

        Raises:
            UnknownModel, ConfiguredModel.
        """
        self._not_configured(name)
        names = [name, *efforts]
        keys = [MODELS, PROFILES, PREVIOUS_PROFILES, price_key(name), PAUSED, LATEST_JOBS, *map(history_key, names)]
        version = await self._writer.run("remove a model", _REMOVE_MODEL, keys, names, (REMOVE_MODEL, name))
        return self._known(name, version)

    async def put_price(self, name: str, price: Price, source: str = "admin") -> int | None:
        """Replace the price; return None if `source` is sync and another one's price stays. Raise UnknownModel."""
        stated = CurrentPrice(price, source, time.time()).to_fields()
        pairs = [word for pair in stated.items() for word in pair]
        arguments = [name, self._flag(name), "1" if source == "sync" else "0", *pairs]
        keys = [MODELS, price_key(name)]
        version = await self._writer.run("store a price", _PUT_PRICE, keys, arguments, (PRICE_MODEL, name))
        return None if version == -2 else self._known(name, version)

    async def put_profile(self, record: ModelRecord, profile: Profile, recipe: str | None = None) -> int:
        """Store a profile of this model as it is now. Raise UnknownModel.

        Args:
            recipe: as of `add_model`.
        """
        arguments = [record.name, self._must_be_stored(record.registered_name), *_handed_over(record, profile, recipe)]
        keys = [MODELS, PROFILES, PREVIOUS_PROFILES, history_key(record.name)]
        act = PROFILE_MODEL, record.name
        version = await self._writer.run("store a profile", _PUT_PROFILE, keys, arguments, act)
        return self._known(record.name, version)

    async def pause_model(self, name: str, *, paused: bool, effort_of: str | None = None) -> int:
        """Leave a model out of traffic, or let it go on; what it is already changes nothing. Raise UnknownModel.

        Args:
            effort_of: the model, if this is the name of an effort.
        """
        pause = Pause(time.time(), self._writer.who).to_json() if paused else ""
        what, action = ("pause a model", PAUSE_MODEL) if paused else ("resume a model", RESUME_MODEL)
        arguments = [name, self._must_be_stored(effort_of or name), pause]
        version = await self._writer.run(what, _PAUSE_MODEL, [MODELS, PAUSED], arguments, (action, name))
        return self._known(name, version)

    async def set_lambda(self, value: float) -> int:
        """Set the default λ in place of the configuration's."""
        override = LambdaOverride(value, time.time(), self._writer.who)
        arguments, act = [LAMBDA, override.to_json()], (CHANGE_SETTINGS, f"{LAMBDA}={value:g}")
        return await self._writer.run("store the settings", _PUT_SETTINGS, [SETTINGS], arguments, act)

    async def reset_settings(self) -> int:
        """Let the configuration hold in all that was set while the server runs."""
        return await self._writer.run("store the settings", _PUT_SETTINGS, [SETTINGS], [], (RESET_SETTINGS, ""))

    def _must_be_stored(self, name: str) -> str:
        """Return the name of a model that the store must have; empty if the configuration defines it."""
        return "" if name in self._configured else name

    def _flag(self, name: str) -> str:
        return "1" if name in self._configured else "0"

    def _not_configured(self, name: str) -> None:
        if name in self._configured:
            raise ConfiguredModel(f"the model {name!r} is defined in the configuration file; change it there")

    def _known(self, name: str, version: int) -> int:
        if version < 0:
            raise UnknownModel(f"no model named {name!r} is registered")
        return version


def _handed_over(record: ModelRecord, profile: Profile, recipe: str | None) -> list[str]:
    """Return what is stored of a profile that no job has measured: the profile, and its entry in the history."""
    entry = ProfileEntry.of(record, profile, time.time(), recipe=recipe)
    return [StoredProfile(record.fingerprint, profile).to_json(), entry.to_text()]


def _readable(record: ModelRecord) -> str:
    """Return the record as text. Raise InvalidRecord if it could not be read again: with half a character, say."""
    text = record.to_json()
    ModelRecord.from_json(record.name, text)
    return text
