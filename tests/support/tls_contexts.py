from __future__ import annotations

import functools
import importlib
from typing import Any


def share_tls_contexts() -> None:
    """Read the authorities of Mozilla once. By itself each client does, for 20 ms of processor time, TLS or not."""
    transports: Any = importlib.import_module("httpx._transports.default")
    transports.create_ssl_context = functools.cache(transports.create_ssl_context)
