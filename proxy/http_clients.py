"""httpx clients that take the ways out of `proxy.outbound`, and read nothing of the environment themselves."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import httpx

from proxy.outbound import Outbound, OutboundError, Trust

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
