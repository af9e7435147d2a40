"""What the environment says of connections to others: which HTTP proxy they take, and whose certificates are trusted.

One rule for relayed and translated models, the price feed and the commands: no HTTP library reads these variables.
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

# True: the usual certificates. False: any certificate. A text: the file or folder of the certificates to trust.
Trust = bool | str

USUAL: Trust = True

_DEFAULT_PORTS = {"http": 80, "https": 443}

_SOCKS = re.compile(r"socks\w*", re.IGNORECASE)

_LABELS = re.compile(r"[^\s/?#@\[\]:\\]+")

_SWITCHES = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


class OutboundError(Exception):
    """A way out is asked for that cannot be taken. The message names the variable, or the parameter, and the fix."""


class Proxies:
    """HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY in either case, read once; the lower case wins."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        variables = _proxy_variables(environ)
        self._stated = {name.removesuffix("_proxy"): (variable, value) for name, (variable, value) in variables.items()}
        _, direct = self._stated.pop("no", ("", ""))
        self._system = not self._stated and sys.platform in ("darwin", "win32")
        if self._system:
            self._stated = {scheme: ("the system's settings", url) for scheme, url in getproxies().items()}
        self._exceptions = _Exceptions(direct)
        self.of = lru_cache(maxsize=1024)(self._of)

    @property
    def problems(self) -> tuple[str, ...]:
        """What is stated and cannot be used, a sentence each."""
        found: dict[str, None] = {}
        for scheme in _DEFAULT_PORTS:
            try:
                self._proxy(scheme)
            except OutboundError as problem:
                found[str(problem)] = None
        return (*found, *self._exceptions.problems)

    def _of(self, url: str) -> str | None:
        """The proxy for this address; None: it is reached directly. Raises OutboundError where it cannot be used."""
        parts = urlsplit(url)
        if self._exceptions.cover(parts):
            return None
        if self._system and proxy_bypass(parts.hostname or ""):
            return None
        return self._proxy(parts.scheme)

    def _proxy(self, scheme: str) -> str | None:
        variable, stated = self._stated.get(scheme) or self._stated.get("all") or ("", "")
        if not stated:
            return None
        proxy = stated if "://" in stated else f"http://{stated}"
        kind = proxy.partition("://")[0]
        if _SOCKS.fullmatch(kind):
            raise OutboundError(f"{variable} names a SOCKS proxy, which cannot be used here; give an HTTP proxy")
        if not _is_proxy(proxy):  # it is not repeated: it may hold a password
            raise OutboundError(f"{variable} is not the address of an HTTP proxy, as http://proxy.example:3128")
        return proxy


def _proxy_variables(environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """By the name in lower case: which variable states it, and what."""
    found: dict[str, tuple[str, str]] = {}
    for variable in sorted(environ):  # capitals sort before small letters, which so overrule them
        name, value = variable.lower(), environ[variable].strip()
        if name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
            found[name] = (variable, value)
    return {name: stated for name, stated in found.items() if stated[1]}


def _is_proxy(url: str) -> bool:
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
        return _LABELS.fullmatch(name) is not None and bool(name.encode("idna"))
    except UnicodeError:
        return False


class _Exceptions:
    """Addresses that no proxy is asked for: this machine, and what NO_PROXY lists.

    An entry is a name (for it and all names below it, a leading `.` or `*.` says the same), an address, a range of
    addresses (10.0.0.0/8, fd00::/8), each also with a port, or `*`. A name is not looked up to compare it with ranges.
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

    def cover(self, parts: SplitResult) -> bool:
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
    """The port is left out where the text is an address of IPv6 without brackets."""
    host, colon, port = text.rpartition(":")
    if colon and port.isascii() and port.isdecimal() and (":" not in host or host.endswith("]")):
        return host, int(port)
    return text, None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """One of IPv4 written in IPv6 is taken as what it is."""
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
    """What `ssl_verify` of a model means, or where it states nothing the variable SSL_VERIFY.

    Raises:
        OutboundError: it is neither true nor false nor the path of certificates.
    """
    where, value = ("ssl_verify", stated) if stated is not None else ("SSL_VERIFY", environ.get("SSL_VERIFY") or None)
    if value is None or isinstance(value, bool):
        return value is not False
    if isinstance(value, str) and value.lower() in _SWITCHES:
        return _SWITCHES[value.lower()]
    if isinstance(value, str) and value and Path(value).expanduser().exists():
        return value
    raise OutboundError(f"{where} must be true, false or the path of a file of trusted certificates (PEM)")


def ssl_context(trust: Trust, environ: Mapping[str, str]) -> ssl.SSLContext:
    """The usual certificates are Mozilla's, as every HTTP client of Python brings them, unless SSL_CERT_FILE or
    SSL_CERT_DIR name others. Raises OutboundError where the named ones cannot be read."""
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
    """The ways out of one process: its proxies, and a TLS context for each trust, made when it is first needed."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.proxies = Proxies(environ)
        self._contexts: dict[Trust, ssl.SSLContext] = {}

    def trust_of(self, stated: object) -> Trust:
        """Raises OutboundError."""
        return trust_of(stated, self._environ)

    def context(self, trust: Trust = USUAL) -> ssl.SSLContext:
        """Raises OutboundError."""
        if trust not in self._contexts:
            self._contexts[trust] = ssl_context(trust, self._environ)
        return self._contexts[trust]

    def problems(self) -> tuple[str, ...]:
        """What is stated in the environment and cannot be used, a sentence each."""
        try:
            if any(self._environ.get(name) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSL_VERIFY")):
                self.context(self.trust_of(None))
        except OutboundError as problem:
            return (*self.proxies.problems, str(problem))
        return self.proxies.problems


T = TypeVar("T", httpx.HTTPTransport, httpx.AsyncHTTPTransport)


class WayOutError(httpx.ConnectError):
    """The way that the environment names cannot be taken. The message says why."""


class _Ways(Generic[T]):
    """A transport for each proxy and each trust, opened when it is first needed."""

    def __init__(self, outbound: Outbound, make: Callable[..., T], limits: httpx.Limits | None) -> None:
        self._outbound = outbound
        self._make: Callable[..., T] = make
        self._limits: dict[str, Any] = {} if limits is None else {"limits": limits}
        self.open: dict[tuple[str | None, Trust | None], T] = {}

    def to(self, request: httpx.Request, trust: Trust | None) -> T:
        """Raises WayOutError."""
        try:
            proxy = self._outbound.proxies.of(str(request.url))
            tls = request.url.scheme == "https"
            way = (proxy, (self._outbound.trust_of(None) if trust is None else trust) if tls else None)
            if way not in self.open:
                self.open[way] = self._opened(*way)
        except OutboundError as error:
            raise WayOutError(str(error), request=request) from error
        return self.open[way]

    def _opened(self, proxy: str | None, trust: Trust | None) -> T:
        verify = False if trust is None else self._outbound.context(trust)
        if proxy is None:
            return self._make(verify=verify, trust_env=False, **self._limits)
        behind_tls = self._outbound.context() if proxy.startswith("https:") else None
        named = httpx.Proxy(proxy, ssl_context=behind_tls)
        return self._make(verify=verify, trust_env=False, proxy=named, **self._limits)


class AsyncTransport(httpx.AsyncBaseTransport):
    """Each request goes the way that its address has, with the trust that `trust` says; None is the usual one."""

    def __init__(
        self,
        outbound: Outbound,
        limits: httpx.Limits | None = None,
        trust: Callable[[httpx.Request], Trust | None] = lambda _: None,
    ) -> None:
        self._ways = _Ways(outbound, httpx.AsyncHTTPTransport, limits)
        self._trust = trust

    @property
    def open(self) -> tuple[httpx.AsyncHTTPTransport, ...]:
        """The transports that were needed so far."""
        return tuple(self._ways.open.values())

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await self._ways.to(request, self._trust(request)).handle_async_request(request)

    async def aclose(self) -> None:
        for transport in self.open:
            await transport.aclose()


class Transport(httpx.BaseTransport):
    """The same for clients that wait."""

    def __init__(self, outbound: Outbound) -> None:
        self._ways = _Ways(outbound, httpx.HTTPTransport, None)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return self._ways.to(request, None).handle_request(request)

    def close(self) -> None:
        for transport in self._ways.open.values():
            transport.close()


def http_client(environ: Mapping[str, str] | None = None, **more: Any) -> httpx.Client:
    """A client that follows no redirect. `more`: further arguments of httpx."""
    outbound = Outbound(os.environ if environ is None else environ)
    return httpx.Client(transport=Transport(outbound), trust_env=False, follow_redirects=False, **more)


def async_http_client(environ: Mapping[str, str] | None = None, **more: Any) -> httpx.AsyncClient:
    """A client that follows no redirect. `more`: further arguments of httpx."""
    outbound = Outbound(os.environ if environ is None else environ)
    return httpx.AsyncClient(transport=AsyncTransport(outbound), trust_env=False, follow_redirects=False, **more)
