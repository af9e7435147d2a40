from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

import orjson

from proxy.errors import UpstreamError
from proxy.outbound import USUAL, Outbound, OutboundError, Trust
from proxy.settings.models import SettingsError, referred_variable, resolve_secret
from proxy.settings.schema import Settings
from proxy.storage.models import ModelRecord, ResolvedProvider
from proxy.upstream.errors import unreachable
from proxy.upstream.litellm.params import fixes_parameters, is_openai_url, merge_model_params, secrets_of
from proxy.upstream.origins import address_of
from proxy.upstream.payload import replace_model
from proxy.upstream.pool import PORTS, Origin, authority_of, credentials_of, port_of
from proxy.upstream.sse import encode_json

_USAGE = b'"stream_options":{"include_usage":true},'


def build_body(
    raw: bytes | None, body: Mapping[str, Any], model: str, *, stream: bool, asks_usage: bool = True
) -> bytes:
    """JSON for the upstream: the caller's body for `model`, and of a stream with usage.

    Args:
        raw: what `body` was parsed from, byte for byte; None: it differs, or was made here.
        body: with a text as `model`, if it comes with `raw`.
        model: the upstream's own name for it.
        asks_usage: whether a stream is asked for usage. False: by the caller neither.
    """
    as_it_is = "stream_options" not in body if not (stream and asks_usage) else _asks_usage(body)
    if raw is not None and (as_it_is or "stream_options" not in body):
        spliced = replace_model(raw, body, model)
        if spliced is not None:
            return spliced if as_it_is else _asking_usage(spliced)
    sent = {**body, "model": model}
    if stream and asks_usage:
        options = body.get("stream_options")
        sent["stream_options"] = {**(options if isinstance(options, Mapping) else {}), "include_usage": True}
    else:
        sent.pop("stream_options", None)
        if not stream and sent.get("stream"):  # a parameter of the model's own, which this caller did not ask for
            del sent["stream"]
    return encode(sent)


def encode(body: Mapping[str, Any]) -> bytes:
    """Compact JSON."""
    try:
        return orjson.dumps(body)
    except TypeError:  # an integer beyond 64 bits, half a character
        return encode_json(body)


def _asks_usage(body: Mapping[str, Any]) -> bool:
    options = body.get("stream_options")
    return bool(body.get("stream")) and isinstance(options, Mapping) and options.get("include_usage") is True


def _asking_usage(raw: bytes) -> bytes:
    start = raw.index(b"{") + 1
    return raw[:start] + _USAGE + raw[start:]


_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")

_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")

_HOST = re.compile(r"[!-~]+")

_OURS = frozenset({"content-length", "transfer-encoding"})
"""Nobody states how long our body is but we."""

_PATH = "/%:@!$&'()*+,;=~-._?[]"


@dataclass(frozen=True)
class RequestHead:
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


def build_head(url: str, headers: Mapping[str, str], proxy: str | None, trust: Trust = USUAL) -> RequestHead:
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
    return RequestHead(origin, line, sent, line + _lines(sent))


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


log = logging.getLogger("uniroute.upstream")

PATH = "/chat/completions"

_OWN_HEADERS = ("extra_headers", "headers")


@dataclass(frozen=True)
class Endpoint:
    """One relayed model, its secrets resolved."""

    name: str
    heads: RequestHead = field(repr=False)
    model: str
    renames: Mapping[str, str]
    fixed: Mapping[str, Any] | None = field(repr=False)
    """The model's parameters, where some of them are for the body."""
    secrets: frozenset[str] = field(repr=False)

    def body(self, body: Mapping[str, Any], raw: bytes | None, *, stream: bool, asks_usage: bool = True) -> bytes:
        """`raw`: what `body` was parsed from, if all of it is for the upstream."""
        sent = body if self.fixed is None else merge_model_params(self.fixed, body)
        if not self.renames.keys().isdisjoint(sent):
            sent = self._renamed(sent)
        return build_body(raw if sent is body else None, sent, self.model, stream=stream, asks_usage=asks_usage)

    def _renamed(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Of two names for one thing the one that says something counts; where both do, the provider's own."""
        sent = {name: value for name, value in body.items() if name not in self.renames}
        for name, other in self.renames.items():
            if body.get(name) is not None and sent.get(other) is None:
                sent[other] = body[name]
        return sent


class Endpoints:
    """Made when a model is first asked, and again when its record is another."""

    def __init__(self, settings: Settings, environ: Mapping[str, str], outbound: Outbound) -> None:
        self._settings = settings
        self._environ = environ
        self._outbound = outbound
        self._made: dict[str, tuple[ModelRecord, Endpoint]] = {}

    def of(self, record: ModelRecord, resolved: ResolvedProvider) -> Endpoint:
        """Raises UpstreamFailure where a key or an address is missing."""
        made = self._made.get(record.name)
        if made is not None and made[0] is record:
            return made[1]
        try:
            target = self._target(record, resolved)
        except SettingsError as error:
            log.error("model %s: %s", record.name, error)
            raise UpstreamError(f"{record.name}: this server has no key for it", retryable=True) from None
        except (OutboundError, ValueError) as error:
            log.error("model %s: %s", record.name, error)
            raise unreachable(error, record.name) from None
        self._made[record.name] = (record, target)
        return target

    def retain(self, models: Mapping[str, ModelRecord]) -> None:
        self._made = {name: made for name, made in self._made.items() if models.get(name) is made[0]}

    def _target(self, record: ModelRecord, resolved: ResolvedProvider) -> Endpoint:
        params = record.litellm_params
        base = self._value(address_of(params) or resolved.api_base or "")
        key = self._key(params, resolved)
        own = {
            name: {field: self._value(text) for field, text in (params.get(name) or {}).items()}
            for name in _OWN_HEADERS
        }
        headers = {"content-type": "application/json", "accept-encoding": "identity", "user-agent": "uniroute"}
        if key:
            headers["authorization"] = f"Bearer {key}"
        if params.get("organization"):
            headers["openai-organization"] = self._value(params["organization"])
        url = url_of(base)
        trust = self._trust(params) if url.startswith("https:") else USUAL
        for each in own.values():
            headers |= {name.lower(): text for name, text in each.items()}
        return Endpoint(
            name=record.name,
            heads=build_head(url, headers, self._outbound.proxies.of(url), trust),
            model=resolved.model,
            renames=resolved.param_aliases,
            fixed=params if fixes_parameters(params) else None,
            secrets=secrets_of({**params, "api_key": key, "api_base": base, **own}, key),
        )

    def _trust(self, params: Mapping[str, Any]) -> Trust:
        """Raises OutboundError."""
        stated = params.get("ssl_verify")
        return self._outbound.trust_of(self._value(stated) if isinstance(stated, str) else stated)

    def _key(self, params: Mapping[str, Any], resolved: ResolvedProvider) -> str | None:
        if params.get("api_key"):
            return self._value(params["api_key"])
        address = address_of(params)
        if address and not (resolved.own_address or is_openai_url(address)):
            return None  # an older version may have stored a variable all the same
        name = referred_variable(f"os.environ/{resolved.key_variable}") if resolved.key_variable else None
        return self._environ.get(name) if name else None

    def _value(self, stated: str) -> str:
        return resolve_secret(stated, self._environ, self._settings.allowed_env)


def url_of(base: str) -> str:
    """Of chat completions below `base`, whose query stays."""
    address, mark, query = base.partition("?")
    path = address.rstrip("/")
    return (path if path.endswith(PATH) else path + PATH) + mark + query
