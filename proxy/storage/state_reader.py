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


class StateReader:
    """Read what changed. Keep the last good reading, and warn of each broken entry once."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._raw_prices: dict[str, object] = {}
        self._warn_once = WarnOnce(log)
        self.last = StoredState()

    async def read(self, configured: Collection[str], *, whole: bool = False) -> bool:
        """Bring `last` up to date; return whether it changed.

        Args:
            configured: models of the configuration, whose prices are read too.
            whole: read all even if the version is the same. An emptied store may count up to the same version.

        Raises:
            StoreUnavailable: `last` stays as it was.
        """
        names = sorted({*configured, *self.last.models})
        version, *raw_prices = await self._pipeline([("GET", VERSION), *(("HGETALL", price_key(n)) for n in names)])
        before = self.last
        if whole or self._version(version) != self.last.version:
            self.last = await self._read_all()
            # Read the prices again: those that were read before may be older than this version.
            names = sorted({*configured, *self.last.models})
            raw_prices = await self._pipeline([("HGETALL", price_key(name)) for name in names])
        prices = self._prices(dict(zip(names, raw_prices, strict=True)))
        if prices != self.last.prices:
            self.last = replace(self.last, prices=prices)
        return self.last is not before

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
        """Parse a hash.

        Args:
            keep_last: keep the last good value of an entry that cannot be read. Not of a key, which may be revoked.
        """
        if not isinstance(raw, dict):
            self._warn_once(key, f"cannot be read, the last reading stays: {raw}")
            return last
        entries: dict[str, _Entry] = {}
        for name, text in raw.items():
            try:
                entries[name] = parse(name, text)
            except InvalidInput as error:
                self._warn_once(f"{key} {name}", str(error))
                if keep_last and name in last:
                    entries[name] = last[name]
        return entries

    def _prices(self, raw_prices: Mapping[str, object]) -> Mapping[str, CurrentPrice]:
        prices: dict[str, CurrentPrice] = {}
        for name, raw in raw_prices.items():
            last = self.last.prices.get(name)
            if raw != self._raw_prices.get(name) or isinstance(raw, RedisError):
                last = self._price(name, raw, last)
            if last is not None:
                prices[name] = last
        self._raw_prices = dict(raw_prices)
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
