from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

import orjson

from proxy.errors import UpstreamError
from proxy.settings.litellm_params import is_openai_url, merge_model_params, secrets_of, stated_address
from proxy.settings.models import SettingsError, referred_variable, resolve_secret
from proxy.settings.outbound import DEFAULT_TRUST, Outbound, OutboundError, Trust
from proxy.settings.schema import Settings
from proxy.storage.models import ModelRecord, ResolvedProvider
from proxy.upstream.errors import unreachable
from proxy.upstream.payload import replace_model
from proxy.upstream.pool import DEFAULT_PORTS, Origin, authority_of, basic_auth_of, port_of
from proxy.upstream.sse import encode_json

_USAGE = b'"stream_options":{"include_usage":true},'


def build_body(
    raw: bytes | None, body: Mapping[str, Any], model: str, *, stream: bool, include_usage: bool = True
) -> bytes:
    """Encode the caller's body for the upstream, with its name of the model, and ask a stream for its usage.

    Args:
        raw: the bytes that `body` was parsed from; None if it differs, or was made here.
        body: its `model` is a string, if it comes with `raw`.
        model: the upstream's own name for the model.
        include_usage: whether a stream is asked for its usage. False also drops the caller's `stream_options`.
    """
    unchanged = "stream_options" not in body if not (stream and include_usage) else _asks_for_usage(body)
    if raw is not None and (unchanged or "stream_options" not in body):
        replaced = replace_model(raw, body, model)
        if replaced is not None:
            return replaced if unchanged else _insert_usage(replaced)
    sent = {**body, "model": model}
    if stream and include_usage:
        options = body.get("stream_options")
        sent["stream_options"] = {**(options if isinstance(options, Mapping) else {}), "include_usage": True}
    else:
        sent.pop("stream_options", None)
        if not stream and sent.get("stream"):  # fixed by the model's parameters; this caller did not ask for it
            del sent["stream"]
    return encode(sent)


def encode(body: Mapping[str, Any]) -> bytes:
    """Encode compact JSON."""
    try:
        return orjson.dumps(body)
    except TypeError:  # an integer beyond 64 bits, half a character
        return encode_json(body)


def _asks_for_usage(body: Mapping[str, Any]) -> bool:
    options = body.get("stream_options")
    return bool(body.get("stream")) and isinstance(options, Mapping) and options.get("include_usage") is True


def _insert_usage(raw: bytes) -> bytes:
    start = raw.index(b"{") + 1
    return raw[:start] + _USAGE + raw[start:]


_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")

_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")

_HOST = re.compile(r"[!-~]+")

# Headers that no model may fix: the connection writes them.
_RESERVED_HEADERS = frozenset({"content-length", "transfer-encoding"})

_PATH = "/%:@!$&'()*+,;=~-._?[]"


@dataclass(frozen=True)
class RequestHead:
    """Request line and headers of all requests to one address, without the length of the body."""

    origin: Origin
    line: bytes = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    prebuilt: bytes = field(repr=False)

    def render(self, more: Mapping[str, str]) -> bytes:
        """Encode the head with these well-formed headers too, which win over those of the address."""
        if self.headers.keys().isdisjoint(more):
            return self.prebuilt + _lines(more)
        return self.line + _lines({**self.headers, **more})


def build_head(url: str, headers: Mapping[str, str], proxy: str | None, trust: Trust = DEFAULT_TRUST) -> RequestHead:
    """Build the head of requests to an address.

    Args:
        headers: names in lower case.

    Raises:
        ValueError: the address is no HTTP address, or a header cannot be sent.
    """
    parts, host, port = _parse_url("an address", url)
    if proxy is not None:
        _parse_url("the address of an HTTP proxy", proxy)
    origin = Origin(host, port, parts.scheme == "https", proxy, trust)
    sent = {name: value for name, value in headers.items() if name not in _RESERVED_HEADERS}
    for name, value in sent.items():
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise ValueError(f"the header {name[:64]!r} cannot be sent")
    sent.setdefault("host", _host(parts, origin))
    if credentials := basic_auth_of(url):
        sent.setdefault("authorization", credentials)
    if proxy is not None and not origin.tls and (credentials := basic_auth_of(proxy)):
        sent["proxy-authorization"] = credentials
    line = f"POST {_target(parts, origin)} HTTP/1.1\r\n".encode()
    return RequestHead(origin, line, sent, line + _lines(sent))


def _parse_url(what: str, url: str) -> tuple[SplitResult, str, int]:
    """Return parts, host and port of an HTTP address. Raises ValueError."""
    parts = urlsplit(url)
    host = (parts.hostname or "").encode("idna").decode()
    if parts.scheme not in DEFAULT_PORTS or not _HOST.fullmatch(host):
        raise ValueError(f"{what} is http:// or https://, and names a host")
    return parts, host, port_of(parts)


def _target(parts: SplitResult, origin: Origin) -> str:
    """Return the target of the request line. An HTTP proxy needs the whole address."""
    path = quote(parts.path, safe=_PATH) or "/"
    target = f"{path}?{quote(parts.query, safe=_PATH)}" if parts.query else path
    return target if origin.proxy is None or origin.tls else f"http://{_host(parts, origin)}{target}"


def _host(parts: SplitResult, origin: Origin) -> str:
    authority = authority_of(origin.host, origin.port)
    return authority.rpartition(":")[0] if origin.port == DEFAULT_PORTS[parts.scheme] else authority


def _lines(headers: Mapping[str, str]) -> bytes:
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()]).encode()


log = logging.getLogger("uniroute.upstream")

PATH = "/chat/completions"

_OWN_HEADERS = ("extra_headers", "headers")


@dataclass(frozen=True)
class Endpoint:
    """How one model is called directly, with its secrets resolved."""

    name: str
    head: RequestHead = field(repr=False)
    model: str
    param_aliases: Mapping[str, str]
    model_params: Mapping[str, Any] | None = field(repr=False)
    """The model's own parameters, if any of them goes into the body."""
    secrets: frozenset[str] = field(repr=False)

    def build_body(
        self, body: Mapping[str, Any], raw: bytes | None, *, stream: bool, include_usage: bool = True
    ) -> bytes:
        """Encode a request. `raw`: the bytes that `body` was parsed from, if all of it is for the upstream."""
        sent = body if self.model_params is None else merge_model_params(self.model_params, body)
        if not self.param_aliases.keys().isdisjoint(sent):
            sent = self._with_aliases(sent)
        raw = raw if sent is body else None
        return build_body(raw, sent, self.model, stream=stream, include_usage=include_usage)

    def _with_aliases(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Use the provider's names. If two names of one field both have a value, the provider's own counts."""
        sent = {name: value for name, value in body.items() if name not in self.param_aliases}
        for name, other in self.param_aliases.items():
            if body.get(name) is not None and sent.get(other) is None:
                sent[other] = body[name]
        return sent


class Endpoints:
    """The endpoints of all models, each made at the first call and again when its record has changed."""

    def __init__(self, settings: Settings, environ: Mapping[str, str], outbound: Outbound) -> None:
        self._settings = settings
        self._environ = environ
        self._outbound = outbound
        self._endpoints: dict[str, tuple[ModelRecord, Endpoint]] = {}

    def get(self, record: ModelRecord, resolved: ResolvedProvider) -> Endpoint:
        """Raises UpstreamError if a key is missing or the address cannot be used."""
        known = self._endpoints.get(record.name)
        if known is not None and known[0] is record:
            return known[1]
        try:
            endpoint = self._make_endpoint(record, resolved)
        except SettingsError as error:
            log.error("model %s: %s", record.name, error)
            raise UpstreamError(f"{record.name}: this server has no key for it", retryable=True) from None
        except (OutboundError, ValueError) as error:
            log.error("model %s: %s", record.name, error)
            raise unreachable(error, record.name) from None
        self._endpoints[record.name] = (record, endpoint)
        return endpoint

    def retain(self, models: Mapping[str, ModelRecord]) -> None:
        """Forget the models that are gone or changed."""
        self._endpoints = {name: known for name, known in self._endpoints.items() if models.get(name) is known[0]}

    def _make_endpoint(self, record: ModelRecord, resolved: ResolvedProvider) -> Endpoint:
        params = record.litellm_params
        base = self._value(stated_address(params) or resolved.api_base or "")
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
        trust = self._trust(params) if url.startswith("https:") else DEFAULT_TRUST
        for each in own.values():
            headers |= {name.lower(): text for name, text in each.items()}
        return Endpoint(
            name=record.name,
            head=build_head(url, headers, self._outbound.proxies.for_url(url), trust),
            model=resolved.model,
            param_aliases=resolved.param_aliases,
            model_params=params if record.has_body_params else None,
            secrets=secrets_of({**params, "api_key": key, "api_base": base, **own}, key),
        )

    def _trust(self, params: Mapping[str, Any]) -> Trust:
        """Raises OutboundError."""
        stated = params.get("ssl_verify")
        return self._outbound.trust_of(self._value(stated) if isinstance(stated, str) else stated)

    def _key(self, params: Mapping[str, Any], resolved: ResolvedProvider) -> str | None:
        if params.get("api_key"):
            return self._value(params["api_key"])
        address = stated_address(params)
        if address and not (resolved.own_address or is_openai_url(address)):
            return None  # an older version may have stored a variable anyway
        name = referred_variable(f"os.environ/{resolved.key_variable}") if resolved.key_variable else None
        return self._environ.get(name) if name else None

    def _value(self, stated: str) -> str:
        return resolve_secret(stated, self._environ, self._settings.allowed_env)


def url_of(base: str) -> str:
    """Return the address of chat completions below `base`. A query stays."""
    address, mark, query = base.partition("?")
    path = address.rstrip("/")
    return (path if path.endswith(PATH) else path + PATH) + mark + query
