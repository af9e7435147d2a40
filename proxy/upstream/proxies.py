"""HTTP proxies of the environment, between this server and its models. Read once; connects to nobody."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from urllib.parse import urlsplit
from urllib.request import proxy_bypass_environment

_SCHEMES = ("http", "https")


class Proxies:
    """HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, in either case."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        lower = {name.lower(): value for name, value in environ.items() if value}
        both = lower.get("all_proxy")
        self._stated = {scheme: lower.get(f"{scheme}_proxy", both) for scheme in _SCHEMES}
        self._none_for = lower.get("no_proxy", "")
        self.of = lru_cache(maxsize=1024)(self._of)

    def _of(self, url: str) -> str | None:
        """The proxy for this address; None: there is none, or it is left out."""
        parts = urlsplit(url)
        stated = self._stated.get(parts.scheme)
        if not stated or proxy_bypass_environment(parts.netloc, {"no": self._none_for}):
            return None
        return stated if "://" in stated else f"http://{stated}"
