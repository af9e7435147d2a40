"""Exceptions of other rooms that reach HTTP, and what each is over HTTP. One table."""

from __future__ import annotations

from collections.abc import Mapping

from proxy.errors import BadRequest, Conflict, ProxyError, Unavailable, UnknownClientKey, UnknownName
from proxy.storage.redis import StoreUnavailable
from proxy.storage.registry import ChangedMeanwhile, DefinedInConfig, KeyIsOver, NameTaken, UnknownKey, UnknownModel
from router_core.errors import InvalidInput, MapMismatch

FOREIGN: Mapping[type[Exception], type[ProxyError]] = {
    StoreUnavailable: Unavailable,
    NameTaken: Conflict,
    DefinedInConfig: Conflict,
    ChangedMeanwhile: Conflict,
    KeyIsOver: Conflict,
    UnknownKey: UnknownClientKey,
    UnknownModel: UnknownName,
    InvalidInput: BadRequest,
    MapMismatch: BadRequest,
}


def translated(error: Exception) -> ProxyError:
    kind = next(FOREIGN[kind] for kind in type(error).__mro__ if kind in FOREIGN)
    return kind(str(error), param=getattr(error, "param", None))
