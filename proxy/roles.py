"""What a client key may call, by its role: `client` asks models, `viewer` reads, `admin` may call all. No HTTP."""

from __future__ import annotations

from typing import Final

from proxy.errors import Forbidden
from proxy.storage.client_keys import Role

ADMIN: Final = "/admin"
METRICS: Final = "/metrics"
READS: Final = frozenset({"GET", "HEAD", "OPTIONS"})


def is_admin_side(path: str) -> bool:
    return path == ADMIN or path.startswith(f"{ADMIN}/")


def check_role(role: Role, method: str, path: str) -> None:
    """Raises Forbidden."""
    if role == "admin":
        return
    if role == "viewer":
        if method not in READS:
            raise Forbidden("a key of the role viewer may only read; asking models needs the role client")
    elif is_admin_side(path):
        raise Forbidden("this call needs the admin key, or a key of the role admin")
    elif path == METRICS:  # they tell of all models, and of everybody's money
        raise Forbidden("the metrics need a key of the role viewer or admin")
