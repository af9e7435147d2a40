from __future__ import annotations

import zlib
from typing import Protocol

_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS

_GZIP = b"\x1f"

_ZLIB = b"\x78"

_ZLIBS_NAMES = frozenset({"gzip", "x-gzip", "deflate"})
"""What servers call it."""


class Unpacker(Protocol):
    """zlib's."""

    @property
    def unused_data(self) -> bytes: ...

    @property
    def unconsumed_tail(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def unpacker_of(coding: str | None, beginning: bytes) -> Unpacker | None:
    """None: it is plain, or packed in a way that nobody here asked for, which its reader will find.

    Neither JSON nor events begin as packed bytes do.

    Args:
        coding: what the header says.
        beginning: at least a byte of the body.
    """
    first = beginning[:1]
    if first == _GZIP or (first == _ZLIB and (coding or "").lower() in _ZLIBS_NAMES):
        return zlib.decompressobj(_GZIP_OR_ZLIB)
    return None
