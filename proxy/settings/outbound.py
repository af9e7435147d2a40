"""HTTP proxies and trusted certificates of outgoing connections, as the environment states them.

Models, the price feed and the commands all follow these rules. No HTTP library reads these variables itself.
"""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

import certifi
import httpx

# True: the default certificates. False: any certificate. A string: the file or folder of the certificates to trust.
Trust = bool | str

DEFAULT_TRUST: Trust = True

_DEFAULT_PORTS = {"http": 80, "https": 443}

_SOCKS = re.compile(r"socks\w*", re.IGNORECASE)

_HOST_NAME = re.compile(r"[^\s/?#@\[\]:\\]+")

_BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


class OutboundError(Exception):
    """A proxy or certificate is configured that cannot be used. The message names the variable and the fix."""


class Proxies:
    """Read HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY once, in either case; the lower case wins."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        variables = _proxy_variables(environ)
        self._configured = {
            name.removesuffix("_proxy"): (variable, value) for name, (variable, value) in variables.items()
        }
        _, direct = self._configured.pop("no", ("", ""))
        self._system = not self._configured and sys.platform in ("darwin", "win32")
        if self._system:
            self._configured = {scheme: ("the system's settings", url) for scheme, url in getproxies().items()}
        self._no_proxy = _NoProxy(direct)
        self.for_url = lru_cache(maxsize=1024)(self._for_url)

    @property
    def problems(self) -> tuple[str, ...]:
        """Return what is configured and cannot be used, a sentence each."""
        found: dict[str, None] = {}
        for scheme in _DEFAULT_PORTS:
            try:
                self._proxy(scheme)
            except OutboundError as problem:
                found[str(problem)] = None
        return (*found, *self._no_proxy.problems)

    def _for_url(self, url: str) -> str | None:
        """Return the proxy for this address, or None for a direct connection.

        Raises:
            OutboundError: the configured proxy cannot be used.
        """
        parts = urlsplit(url)
        if self._no_proxy.covers(parts):
            return None
        if self._system and proxy_bypass(parts.hostname or ""):
            return None
        return self._proxy(parts.scheme)

    def _proxy(self, scheme: str) -> str | None:
        variable, stated = self._configured.get(scheme) or self._configured.get("all") or ("", "")
        if not stated:
            return None
        proxy = stated if "://" in stated else f"http://{stated}"
        kind = proxy.partition("://")[0]
        if _SOCKS.fullmatch(kind):
            raise OutboundError(f"{variable} names a SOCKS proxy, which cannot be used here; give an HTTP proxy")
        if not _is_proxy_url(proxy):  # it is not repeated: it may hold a password
            raise OutboundError(f"{variable} is not the address of an HTTP proxy, as http://proxy.example:3128")
        return proxy


def _proxy_variables(environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return variable and value by the name in lower case."""
    found: dict[str, tuple[str, str]] = {}
    for variable in sorted(environ):  # capitals sort first, so that lower case overrules them
        name, value = variable.lower(), environ[variable].strip()
        if name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
            found[name] = (variable, value)
    return {name: stated for name, stated in found.items() if stated[1]}


def _is_proxy_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return False
    if parts.scheme not in _DEFAULT_PORTS or port == 0 or not url.isprintable() or " " in url:
        return False
    return _address(host) is not None or _is_host(host)


def _is_host(name: str) -> bool:
    try:
        return _HOST_NAME.fullmatch(name) is not None and bool(name.encode("idna"))
    except UnicodeError:
        return False


class _NoProxy:
    """The addresses that are reached without a proxy: this machine, and what NO_PROXY lists.

    An entry is a name (it covers all names below it, with or without a leading `.` or `*.`), an address, a range of
    addresses (10.0.0.0/8, fd00::/8), each also with a port, or `*`. Names are not resolved to compare them with ranges.
    """

    def __init__(self, stated: str) -> None:
        self._names: set[tuple[str, int | None]] = set()
        self._ranges: list[tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, int | None]] = []
        self._everything = False
        self.problems: list[str] = []
        for entry in filter(None, re.split(r"[,\s]+", stated)):
            self._add(entry)

    def _add(self, entry: str) -> None:
        text = entry.partition("://")[2] or entry
        if text == "*":
            self._everything = True
            return
        host, port = _split_port(text)
        try:
            if "/" in host or _address(host) is not None:
                self._ranges.append((ipaddress.ip_network(host.replace("[", "").replace("]", ""), strict=False), port))
                return
        except ValueError:
            host = host.removesuffix("/")
        name = host.removeprefix("*").strip(".").lower()
        if _is_host(name):
            self._names.add((name, port))
        else:
            self.problems.append(f"NO_PROXY: {entry[:100]!r} is no name, address or range of addresses; it is ignored")

    def covers(self, parts: SplitResult) -> bool:
        host, port = (parts.hostname or "").rstrip("."), parts.port or _DEFAULT_PORTS.get(parts.scheme)
        address = _address(host)
        if self._everything or _is_this_machine(host, address):
            return True
        if address is not None:
            return any(address in network and only in (None, port) for network, only in self._ranges)
        labels = host.split(".")
        names = {".".join(labels[start:]) for start in range(len(labels))}
        return any(name in names and only in (None, port) for name, only in self._names)


def _split_port(text: str) -> tuple[str, int | None]:
    """Split host and port. An IPv6 address without brackets has no port."""
    host, colon, port = text.rpartition(":")
    if colon and port.isascii() and port.isdecimal() and (":" not in host or host.endswith("]")):
        return host, int(port)
    return text, None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Parse an IP address. An IPv4 address mapped to IPv6 becomes IPv4."""
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _is_this_machine(host: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address | None) -> bool:
    if address is not None:
        return address.is_loopback or address.is_unspecified
    return host == "localhost" or host.endswith(".localhost")


def trust_of(stated: object, environ: Mapping[str, str]) -> Trust:
    """Read `ssl_verify` of a model, or the variable SSL_VERIFY if the model states nothing.

    Raises:
        OutboundError: it is neither true nor false nor the path of certificates.
    """
    where, value = ("ssl_verify", stated) if stated is not None else ("SSL_VERIFY", environ.get("SSL_VERIFY") or None)
    if value is None or isinstance(value, bool):
        return value is not False
    if isinstance(value, str) and value.lower() in _BOOLEANS:
        return _BOOLEANS[value.lower()]
    if isinstance(value, str) and value and Path(value).expanduser().exists():
        return value
    raise OutboundError(f"{where} must be true, false or the path of a file of trusted certificates (PEM)")


def ssl_context(trust: Trust, environ: Mapping[str, str]) -> ssl.SSLContext:
    """Make a TLS context for this trust.

    The default certificates are Mozilla's, from certifi, unless SSL_CERT_FILE or SSL_CERT_DIR name others.

    Raises:
        OutboundError: the certificates cannot be read.
    """
    where, file, folder = "ssl_verify", None, None
    if isinstance(trust, str):
        file = str(Path(trust).expanduser())
    else:
        file, folder = environ.get("SSL_CERT_FILE") or None, environ.get("SSL_CERT_DIR") or None
        where = "SSL_CERT_FILE"
    if file is not None and Path(file).is_dir():
        file, folder = None, file
    if trust is False or not (file or folder):
        file, folder = certifi.where(), None
    try:
        context = ssl.create_default_context(cafile=file, capath=folder)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise OutboundError(
            f"{where}: {file or folder} is no file of certificates (PEM) that can be read: {why}"
        ) from None
    if trust is False:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class Outbound:
    """The proxies of one process, and a TLS context for each trust, made when first needed."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.proxies = Proxies(environ)
        self._contexts: dict[Trust, ssl.SSLContext] = {}

    def trust_of(self, stated: object) -> Trust:
        """Raises OutboundError."""
        return trust_of(stated, self._environ)

    def context(self, trust: Trust = DEFAULT_TRUST) -> ssl.SSLContext:
        """Raises OutboundError."""
        if trust not in self._contexts:
            self._contexts[trust] = ssl_context(trust, self._environ)
        return self._contexts[trust]

    def problems(self) -> tuple[str, ...]:
        """Return what the environment configures and cannot be used, a sentence each."""
        try:
            if any(self._environ.get(name) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSL_VERIFY")):
                self.context(self.trust_of(None))
        except OutboundError as problem:
            return (*self.proxies.problems, str(problem))
        return self.proxies.problems


T = TypeVar("T", httpx.HTTPTransport, httpx.AsyncHTTPTransport)


class OutboundConnectError(httpx.ConnectError):
    """The proxy or certificates that the environment names cannot be used. The message says why."""


class _TransportPool(Generic[T]):
    """A transport for each proxy and each trust, opened when first needed."""

    def __init__(self, outbound: Outbound, make: Callable[..., T], limits: httpx.Limits | None) -> None:
        self._outbound = outbound
        self._make: Callable[..., T] = make
        self._limits: dict[str, Any] = {} if limits is None else {"limits": limits}
        self.open: dict[tuple[str | None, Trust | None], T] = {}

    def get(self, request: httpx.Request, trust: Trust | None) -> T:
        """Return the transport for this request. Raises OutboundConnectError."""
        try:
            proxy = self._outbound.proxies.for_url(str(request.url))
            if request.url.scheme != "https":
                trust = None
            elif trust is None:
                trust = self._outbound.trust_of(None)
            if (proxy, trust) not in self.open:
                self.open[proxy, trust] = self._make_transport(proxy, trust)
        except OutboundError as error:
            raise OutboundConnectError(str(error), request=request) from error
        return self.open[proxy, trust]

    def _make_transport(self, proxy: str | None, trust: Trust | None) -> T:
        verify = False if trust is None else self._outbound.context(trust)
        if proxy is None:
            return self._make(verify=verify, trust_env=False, **self._limits)
        behind_tls = self._outbound.context() if proxy.startswith("https:") else None
        named = httpx.Proxy(proxy, ssl_context=behind_tls)
        return self._make(verify=verify, trust_env=False, proxy=named, **self._limits)


class AsyncTransport(httpx.AsyncBaseTransport):
    """Send each request through the proxy for its address, with the trust that `trust` returns; None is the default."""

    def __init__(
        self,
        outbound: Outbound,
        limits: httpx.Limits | None = None,
        trust: Callable[[httpx.Request], Trust | None] = lambda _: None,
    ) -> None:
        self._transports = _TransportPool(outbound, httpx.AsyncHTTPTransport, limits)
        self._trust = trust

    @property
    def open(self) -> tuple[httpx.AsyncHTTPTransport, ...]:
        """Return the transports that were needed so far."""
        return tuple(self._transports.open.values())

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await self._transports.get(request, self._trust(request)).handle_async_request(request)

    async def aclose(self) -> None:
        for transport in self.open:
            await transport.aclose()


class Transport(httpx.BaseTransport):
    """The same for blocking clients."""

    def __init__(self, outbound: Outbound) -> None:
        self._transports = _TransportPool(outbound, httpx.HTTPTransport, None)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return self._transports.get(request, None).handle_request(request)

    def close(self) -> None:
        for transport in self._transports.open.values():
            transport.close()


def http_client(environ: Mapping[str, str] | None = None, **more: Any) -> httpx.Client:
    """Make a client that follows no redirect. `more`: further arguments of httpx."""
    outbound = Outbound(os.environ if environ is None else environ)
    return httpx.Client(transport=Transport(outbound), trust_env=False, follow_redirects=False, **more)


def async_http_client(environ: Mapping[str, str] | None = None, **more: Any) -> httpx.AsyncClient:
    """Make a client that follows no redirect. `more`: further arguments of httpx."""
    outbound = Outbound(os.environ if environ is None else environ)
    return httpx.AsyncClient(transport=AsyncTransport(outbound), trust_env=False, follow_redirects=False, **more)
