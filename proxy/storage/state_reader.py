from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from redis.exceptions import RedisError

from proxy.storage.client_keys import ClientKey
from proxy.storage.controls import LAMBDA, LambdaOverride, Pause
from proxy.storage.records import CurrentPrice, ModelRecord, StoredProfile, WarnOnce, whole_number
from proxy.storage.redis import (
    KEYS,
    MODELS,
    PAUSED,
    PREVIOUS_PROFILES,
    PROFILES,
    SETTINGS,
    VERSION,
    Store,
    price_key,
)
from router_core.errors import InvalidInput

log = logging.getLogger("uniroute.state")

_Entry = TypeVar("_Entry")


@dataclass(frozen=True)
class StoredState:
    """One consistent reading, parsed.

    An entry that cannot be read has its last good value; a key that cannot be read is absent.
    """

    version: int = -1
    """-1: nothing was read yet."""
    models: Mapping[str, ModelRecord] = field(default_factory=dict)
    profiles: Mapping[str, StoredProfile] = field(default_factory=dict)
    previous_profiles: Mapping[str, StoredProfile] = field(default_factory=dict)
    """Of the same models on the map before."""
    keys: Mapping[str, ClientKey] = field(default_factory=dict)
    """By id."""
    keys_exist: bool = True
    """Also true if they cannot be read: no key is needed only where it is known that none was made."""
    prices: Mapping[str, CurrentPrice] = field(default_factory=dict)
    paused: Mapping[str, Pause] = field(default_factory=dict)
    """By model."""
    lambda_override: LambdaOverride | None = None

    def has_entries_of(self, other: StoredState) -> bool:
        """Return whether nothing has changed: entries that did not change are the same objects."""
        if (self.version, self.keys_exist) != (other.version, other.keys_exist):
            return False
        mine, theirs = self._all_entries(), other._all_entries()
        return mine.keys() == theirs.keys() and all(theirs[name] is entry for name, entry in mine.items())

    def _all_entries(self) -> dict[tuple[int, str], object]:
        parts: tuple[Mapping[str, object], ...]
        parts = (self.models, self.profiles, self.previous_profiles, self.keys, self.prices, self.paused)
        entries = {(place, name): entry for place, part in enumerate(parts) for name, entry in part.items()}
        return {**entries, (-1, LAMBDA): self.lambda_override}


# Models whose prices are read at a time, while nothing says that one changed: a thousand would take a twentieth of the
# event loop.
POLLED_MODELS = 200


class StateReader:
    """Read what changed. Keep the last good reading, and warn of each broken entry once."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._raw_prices: dict[str, object] = {}
        self._next_polled = 0
        # Key → entry → the hash of its text as it was read last. The texts of a thousand profiles are megabytes.
        self._seen: dict[str, dict[str, int]] = {}
        self._warn_once = WarnOnce(log)
        self.last = StoredState()

    async def read(self, configured: Collection[str], *, whole: bool = False) -> None:
        """Bring `last` up to date, or leave it the same object if nothing has changed.

        A price whose change raised no version is found by this call or, of many models, by one of the next.

        Args:
            configured: models of the configuration, whose prices are read too.
            whole: read all even if the version is the same. An emptied store may count up to the same version.

        Raises:
            StoreUnavailable: `last` stays as it was.
        """
        known = {*configured, *self.last.models}
        names = self._polled(sorted(known))
        version, *raw_prices = await self._pipeline([("GET", VERSION), *(("HGETALL", price_key(n)) for n in names)])
        if whole or self._version(version) != self.last.version:
            now = await self._read_all()
            # A change that was announced has often been read before.
            self.last = self.last if now.has_entries_of(self.last) else now
            # Read the prices again: those that were read before may be older than this version.
            known = {*configured, *self.last.models}
            names = sorted(known)
            raw_prices = await self._pipeline([("HGETALL", price_key(name)) for name in names])
        prices = self._prices(dict(zip(names, raw_prices, strict=True)), known)
        if prices != self.last.prices:
            self.last = replace(self.last, prices=prices)

    def _polled(self, names: list[str]) -> list[str]:
        """Return the models whose prices are next."""
        if len(names) <= POLLED_MODELS:
            return names
        start = self._next_polled if self._next_polled < len(names) else 0
        self._next_polled = start + POLLED_MODELS
        return names[start : self._next_polled]

    async def _pipeline(self, commands: list[tuple[str, str]], *, transaction: bool = False) -> list[Any]:
        async with self._store.operation("read the state") as client, client.pipeline(transaction=transaction) as pipe:
            for command in commands:
                pipe.execute_command(*command)
            return await pipe.execute(raise_on_error=False)

    async def _read_all(self) -> StoredState:
        hashes = (MODELS, PROFILES, PREVIOUS_PROFILES, KEYS, PAUSED, SETTINGS)
        commands = [("GET", VERSION), *(("HGETALL", key) for key in hashes)]
        version, models, profiles, previous, keys, paused, settings = await self._pipeline(commands, transaction=True)
        return StoredState(
            version=self._version(version),
            models=self._entries(MODELS, models, self.last.models, ModelRecord.from_json),
            profiles=self._entries(PROFILES, profiles, self.last.profiles, _stored_profile),
            previous_profiles=self._entries(PREVIOUS_PROFILES, previous, self.last.previous_profiles, _stored_profile),
            keys=self._entries(KEYS, keys, self.last.keys, ClientKey.from_json, keep_last=False),
            keys_exist=not isinstance(keys, dict) or bool(keys),
            prices=self.last.prices,
            paused=self._entries(PAUSED, paused, self.last.paused, lambda _, text: Pause.from_json(text)),
            lambda_override=self._lambda_override(settings),
        )

    def _lambda_override(self, raw: object) -> LambdaOverride | None:
        """Return the default λ that was set. Settings that this version does not know are left alone."""
        override = self.last.lambda_override
        last = {} if override is None else {LAMBDA: override}
        known = {name: text for name, text in raw.items() if name == LAMBDA} if isinstance(raw, dict) else raw
        return self._entries(SETTINGS, known, last, lambda _, text: LambdaOverride.from_json(text)).get(LAMBDA)

    def _version(self, raw: object) -> int:
        """Return the version; 0 if it is none of ours. The next change makes it a number again (audit.lua)."""
        version = whole_number(raw or 0)
        if version is None:
            self._warn_once(VERSION, "holds no number; changes that others make without telling are not seen")
        return version or 0

    def _entries(
        self,
        key: str,
        raw: object,
        last: Mapping[str, _Entry],
        parse: Callable[[str, str], _Entry],
        *,
        keep_last: bool = True,
    ) -> Mapping[str, _Entry]:
        """Parse what of a hash has changed.

        Args:
            keep_last: keep the last good value of an entry that cannot be read. Not of a key, which may be revoked.
        """
        if not isinstance(raw, dict):
            self._warn_once(key, f"cannot be read, the last reading stays: {raw}")
            return last
        entries: dict[str, _Entry] = {}
        seen, self._seen[key] = self._seen.get(key, {}), {name: hash(text) for name, text in raw.items()}
        for name, text in raw.items():
            if name in last and seen.get(name) == self._seen[key][name]:
                entries[name] = last[name]
                continue
            try:
                entries[name] = parse(name, text)
            except InvalidInput as error:
                self._warn_once(f"{key} {name}", str(error))
                if keep_last and name in last:
                    entries[name] = last[name]
        return entries

    def _prices(self, raw_prices: Mapping[str, object], known: Collection[str]) -> Mapping[str, CurrentPrice]:
        """Return the prices of all models that are `known`, of which some were read now."""
        prices = {name: price for name, price in self.last.prices.items() if name in known}
        for name, raw in raw_prices.items():
            if raw != self._raw_prices.get(name) or isinstance(raw, RedisError):
                price = self._price(name, raw, prices.pop(name, None))
                if price is not None:
                    prices[name] = price
        self._raw_prices = {name: raw for name, raw in {**self._raw_prices, **raw_prices}.items() if name in known}
        return prices

    def _price(self, name: str, raw: object, last: CurrentPrice | None) -> CurrentPrice | None:
        if not raw:
            return None
        try:
            if not isinstance(raw, dict):
                raise InvalidInput(str(raw))
            return CurrentPrice.from_fields(raw, self._clock())
        except InvalidInput as error:
            self._warn_once(price_key(name), f"{error}; {'the last good price stays' if last else 'ignored'}")
            return last


def _stored_profile(_name: str, text: str) -> StoredProfile:
    return StoredProfile.from_json(text)
