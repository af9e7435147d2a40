"""What the letters of a prompt say beside its words: its length, and shares of digits, operators and the like."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from router_core.types import Floats

# Raised whenever the features of a text change: maps that read them say of which version they are.
SURFACE_VERSION = 1

# Bytes of a kind, and the share of them that counts as 1; more adds nothing.
_KINDS: tuple[tuple[bytes, float], ...] = (
    (b"0123456789", 0.2),
    (b"+-*/=<>^%|&~$", 0.1),
    (b'{}[]();_`#\\"', 0.2),
    (bytes(range(ord("A"), ord("Z") + 1)), 0.2),
    (b"\n", 0.05),
    (bytes(range(128, 256)), 1.0),  # of other scripts
    (b"?.,:!'", 0.1),
)

# 2¹² bytes or more count as 1.
_LONGEST_LOG = 12.0

SURFACE_FEATURES = 1 + len(_KINDS)

_MARKS = [bytes([mark]) for mark in range(1, SURFACE_FEATURES)]
_TABLE = bytes(next((mark for mark, (kind, _) in enumerate(_KINDS, 1) if byte in kind), 0) for byte in range(256))


def surface_features(texts: Sequence[str]) -> Floats:
    """Return (n, SURFACE_FEATURES) float32 from 0 to 1: the logarithm of the length, then the shares of each kind."""
    return np.array([_features(text.encode("utf-8", "replace")) for text in texts], dtype=np.float32).reshape(
        -1, SURFACE_FEATURES
    )


def _features(text: bytes) -> list[float]:
    length = len(text) or 1
    marked = text.translate(_TABLE)
    shares = [marked.count(mark) / length / most for mark, (_, most) in zip(_MARKS, _KINDS, strict=True)]
    return [min(feature, 1.0) for feature in (math.log2(length) / _LONGEST_LOG, *shares)]
