"""The head of a request to an upstream, in bytes, and where it goes. Sends nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import SplitResult, quote, urlsplit

from proxy.outbound import USUAL, Trust
from proxy.upstream.connections import PORTS, Origin, authority_of, credentials_of, port_of

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")
_HOST = re.compile(r"[!-~]+")
_OURS = frozenset({"content-length", "transfer-encoding"})
"""Nobody states how long our body is but we."""
_PATH = "/%:@!$&'()*+,;=~-._?[]"


@dataclass(frozen=True)
class Heads:
    """Of all requests to one address, without the length of the body."""

    origin: Origin
    line: bytes = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    usual: bytes = field(repr=False)

    def head(self, more: Mapping[str, str]) -> bytes:
        """With these headers too, which win over those of the address. They are known to be well formed."""
        if self.headers.keys().isdisjoint(more):
            return self.usual + _lines(more)
        return self.line + _lines({**self.headers, **more})


def heads_of(url: str, headers: Mapping[str, str], proxy: str | None, trust: Trust = USUAL) -> Heads:
    """`headers`: names in lower case. Raises ValueError: such an address cannot be asked, or such a header sent."""
    parts, host, port = _known("an address", url)
    if proxy is not None:
        _known("the address of an HTTP proxy", proxy)
    origin = Origin(host, port, parts.scheme == "https", proxy, trust)
    sent = {name: value for name, value in headers.items() if name not in _OURS}
    for name, value in sent.items():
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise ValueError(f"the header {name[:64]!r} cannot be sent")
    sent.setdefault("host", _host(parts, origin))
    if credentials := credentials_of(url):
        sent.setdefault("authorization", credentials)
    if proxy is not None and not origin.tls and (credentials := credentials_of(proxy)):
        sent["proxy-authorization"] = credentials
    line = f"POST {_target(parts, origin)} HTTP/1.1\r\n".encode()
    return Heads(origin, line, sent, line + _lines(sent))


def _known(what: str, url: str) -> tuple[SplitResult, str, int]:
    """Its parts, host and port. Raises ValueError: nobody can be reached by it."""
    parts = urlsplit(url)
    host = (parts.hostname or "").encode("idna").decode()
    if parts.scheme not in PORTS or not _HOST.fullmatch(host):
        raise ValueError(f"{what} is http:// or https://, and names a host")
    return parts, host, port_of(parts)


def _target(parts: SplitResult, origin: Origin) -> str:
    """Of the request: a proxy on the way is told the whole address."""
    path = quote(parts.path, safe=_PATH) or "/"
    asked = f"{path}?{quote(parts.query, safe=_PATH)}" if parts.query else path
    return asked if origin.proxy is None or origin.tls else f"http://{_host(parts, origin)}{asked}"


def _host(parts: SplitResult, origin: Origin) -> str:
    authority = authority_of(origin.host, origin.port)
    return authority.rpartition(":")[0] if origin.port == PORTS[parts.scheme] else authority


def _lines(headers: Mapping[str, str]) -> bytes:
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()]).encode()
