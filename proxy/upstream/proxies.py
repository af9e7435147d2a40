"""HTTP proxies between this server and its models, as the environment or the system names them. Connects to nobody."""

from __future__ import annotations

from functools import lru_cache
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass


class Proxies:
    """HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, read once."""

    def __init__(self) -> None:
        self._stated = getproxies()
        self.of = lru_cache(maxsize=1024)(self._of)

    def _of(self, url: str) -> str | None:
        """The proxy for this address; None: there is none, or it is left out."""
        parts = urlsplit(url)
        stated = self._stated.get(parts.scheme) or self._stated.get("all")
        if not stated or proxy_bypass(parts.netloc):
            return None
        return stated if "://" in stated else f"http://{stated}"
