"""Responses that clients may refer to later, whole and expiring in Redis.

Each belongs to a scope: the id of the client key that made it, or "" where no key is needed. Of one scope a number of
responses is kept, and a number of bytes; the oldest go first.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import orjson

from proxy.errors import ServiceUnavailable
from proxy.json_text import encode_json
from proxy.storage.records import WarnOnce
from proxy.storage.redis import Availability, Store, StoreUnavailable, awaited, load_script

log = logging.getLogger("uniroute.responses")

PREFIX: Final = "uniroute:responses"

_ID = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)


class ResponseStore:
    """Keep records by id, which belong to a scope. All that is asked of it takes one round trip."""

    def __init__(
        self,
        store: Store,
        ttl_s: int,
        *,
        max_responses_per_key: int,
        max_response_bytes: int,
        max_stored_bytes_per_key: int,
        on_dropped: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            on_dropped: is called for each response that is not kept, though it should be.
        """
        self._store = store
        self._ttl_s = ttl_s
        self._max_responses = max_responses_per_key
        self._max_response_bytes = max_response_bytes
        self._max_bytes = max_stored_bytes_per_key
        self._on_dropped = on_dropped
        self._availability = Availability(log)
        self._warn_once = WarnOnce(log, "a kept response is ignored")

    async def save(self, scope: str, response_id: str, record: Mapping[str, Any]) -> bool:
        """Keep a record, and return whether it is kept. Never fails, and gives up within a second."""
        data = encode_json(record)
        size = len(data)
        largest = min(self._max_response_bytes, self._max_bytes)
        if not _ID.fullmatch(response_id):
            return self._drop(f"its id is not one of a response: {response_id[:60]!r}")
        if size > largest:
            return self._drop(f"it has {size} bytes, and {largest} are kept at most")
        try:
            async with self._store.operation("keep a response") as client:
                limits = (self._ttl_s, self._max_responses, self._max_bytes)
                arguments = (response_id, data, size, *limits, _key(scope, ""))
                await awaited(client.eval(_SAVE, 3, *_keys(scope, response_id), *arguments))
        except StoreUnavailable as error:
            self._availability.mark_unavailable(f"responses are not kept: {error}")
            self._on_dropped()
            return False
        self._availability.mark_available()
        return True

    async def get(self, scope: str, response_id: str) -> dict[str, Any] | None:
        """Return a record of this scope; None if there is none, or no longer.

        Raises:
            ServiceUnavailable: Redis does not answer.
        """
        if not _ID.fullmatch(response_id):
            return None
        try:
            async with self._store.operation("read a kept response") as client:
                text: Any = await client.get(_key(scope, response_id))
        except StoreUnavailable as error:
            raise self._unavailable(error) from error
        self._availability.mark_available()
        return None if text is None else self._read(text)

    async def delete(self, scope: str, response_id: str) -> bool:
        """Forget a record of this scope, and return whether there was one.

        Raises:
            ServiceUnavailable: Redis does not answer.
        """
        if not _ID.fullmatch(response_id):
            return False
        try:
            async with self._store.operation("delete a kept response") as client:
                return bool(await awaited(client.eval(_DELETE, 3, *_keys(scope, response_id), response_id)))
        except StoreUnavailable as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: StoreUnavailable) -> ServiceUnavailable:
        """Say it to a client, which has no use for the address of Redis; the log has that."""
        self._availability.mark_unavailable(f"kept responses are not read: {error}")
        message = "the responses that are kept cannot be reached for now; try again, or send the whole input"
        return ServiceUnavailable(message, headers={"retry-after": "1"})

    def _drop(self, why: str) -> bool:
        log.warning("a response is not kept: %s", why)
        self._on_dropped()
        return False

    def _read(self, text: str) -> dict[str, Any] | None:
        record = _from_json(text)
        if not isinstance(record, dict):
            self._warn_once(PREFIX, "is not what we write")
            return None
        return record


def _key(scope: str, response_id: str) -> str:
    """Return the key of one response. A scope has no colon in it, and neither has an id."""
    return f"{PREFIX}:{{{scope}}}:response:{response_id}"


def _keys(scope: str, response_id: str) -> tuple[str, str, str]:
    index = f"{PREFIX}:{{{scope}}}"
    return _key(scope, response_id), f"{index}:ids", f"{index}:bytes"


_SAVE = load_script(__package__, "save_response")

_DELETE = load_script(__package__, "delete_response")


def _from_json(text: str) -> Any:
    """Parse a stored record; return None if it is no JSON."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:  # half characters are read by the other parser alone
        pass
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
