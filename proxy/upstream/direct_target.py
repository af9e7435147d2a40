"""The address, head and body of requests to one model."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import SplitResult, quote, urlsplit

from proxy.errors import UpstreamError
from proxy.json_text import encode_json
from proxy.settings.litellm_params import (
    is_openai_url,
    merge_model_params,
    secrets_of,
    stated_address,
)
from proxy.settings.model_config import SettingsError, UpstreamAPI, referred_variable, resolve_secret
from proxy.settings.outbound import DEFAULT_TRUST, Outbound, OutboundError, Trust
from proxy.settings.schema import Settings
from proxy.storage.records import ModelRecord, ResolvedProvider
from proxy.upstream.errors import unreachable
from proxy.upstream.key_scope import is_anthropics, own_base, restore_credentials
from proxy.upstream.payload import replace_model
from proxy.upstream.pool import DEFAULT_PORTS, Origin, authority_of, basic_auth_of, port_of

log = logging.getLogger("uniroute.upstream")

# What an address below the model's own is for.
DirectAPI = UpstreamAPI | Literal["embeddings"]

# Inserted at the start of a body.
_USAGE_OPTION = b'"stream_options":{"include_usage":true},'


def build_body(
    raw: bytes | None, body: Mapping[str, Any], model: str, *, stream: bool, include_usage: bool = True
) -> bytes:
    """Encode the caller's body with the upstream's name of the model, and ask for the usage of a stream.

    Args:
        raw: the bytes that `body` was parsed from; None if it differs, or was made here.
        body: if it comes with `raw`, its `model` must be a string.
        model: the upstream's own name for the model.
        include_usage: whether a stream is asked for its usage. False also drops the caller's `stream_options`.
    """
    unchanged = "stream_options" not in body if not (stream and include_usage) else _asks_for_usage(body)
    if raw is not None and (unchanged or "stream_options" not in body):
        replaced = replace_model(raw, body, model)
        if replaced is not None:
            return replaced if unchanged else _insert_usage_option(replaced)
    sent = {**body, "model": model}
    if stream and include_usage:
        options = body.get("stream_options")
        sent["stream_options"] = {**(options if isinstance(options, Mapping) else {}), "include_usage": True}
    else:
        sent.pop("stream_options", None)
        if not stream and sent.get("stream"):  # the model's parameters fix it, but this caller asked for no stream
            del sent["stream"]
    return encode_json(sent)


def _asks_for_usage(body: Mapping[str, Any]) -> bool:
    options = body.get("stream_options")
    return bool(body.get("stream")) and isinstance(options, Mapping) and options.get("include_usage") is True


def _insert_usage_option(raw: bytes) -> bytes:
    start = raw.index(b"{") + 1
    return raw[:start] + _USAGE_OPTION + raw[start:]


_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")

_HEADER_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")

_HOST_NAME = re.compile(r"[!-~]+")

# Headers that no model may fix: the connection writes them.
_RESERVED_HEADERS = frozenset({"content-length", "transfer-encoding"})

# Characters of a path or query that need no escape.
_SAFE_IN_TARGET = "/%:@!$&'()*+,;=~-._?[]"


@dataclass(frozen=True)
class RequestHead:
    """Request line and headers of all requests to one address, without the length of the body."""

    origin: Origin
    line: bytes = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    prebuilt: bytes = field(repr=False)

    def render(self, more: Mapping[str, str]) -> bytes:
        """Encode the head with more headers, which must be well-formed and replace those of the same name."""
        if self.headers.keys().isdisjoint(more):
            return self.prebuilt + _header_lines(more)
        return self.line + _header_lines({**self.headers, **more})


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
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
            raise ValueError(f"the header {name[:64]!r} cannot be sent")
    sent.setdefault("host", _host_header(parts, origin))
    if credentials := basic_auth_of(url):
        sent.setdefault("authorization", credentials)
    if proxy is not None and not origin.tls and (credentials := basic_auth_of(proxy)):
        sent["proxy-authorization"] = credentials
    line = f"POST {_request_target(parts, origin)} HTTP/1.1\r\n".encode()
    return RequestHead(origin, line, sent, line + _header_lines(sent))


def _parse_url(what: str, url: str) -> tuple[SplitResult, str, int]:
    """Return the parts, host and port of an HTTP address. `what` begins the message of a ValueError."""
    parts = urlsplit(url)
    host = (parts.hostname or "").encode("idna").decode()
    if parts.scheme not in DEFAULT_PORTS or not _HOST_NAME.fullmatch(host):
        raise ValueError(f"{what} is http:// or https://, and names a host")
    return parts, host, port_of(parts)


def _request_target(parts: SplitResult, origin: Origin) -> str:
    """Return the target of the request line. An HTTP proxy needs the whole address."""
    path = quote(parts.path, safe=_SAFE_IN_TARGET) or "/"
    target = f"{path}?{quote(parts.query, safe=_SAFE_IN_TARGET)}" if parts.query else path
    return target if origin.proxy is None or origin.tls else f"http://{_host_header(parts, origin)}{target}"


def _host_header(parts: SplitResult, origin: Origin) -> str:
    """Return the host, with its port unless that is the scheme's own."""
    authority = authority_of(origin.host, origin.port)
    return authority.rpartition(":")[0] if origin.port == DEFAULT_PORTS[parts.scheme] else authority


def _header_lines(headers: Mapping[str, str]) -> bytes:
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()]).encode()


# Of Anthropic's Messages. Newer behaviour is asked for by `anthropic-beta`.
ANTHROPIC_VERSION = "2023-06-01"

_VERSION = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)

_BETA = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)

# Of names in `anthropic-beta`.
_MAX_BETAS = 100

# How Anthropic's tokens of a login begin. They are no API keys, and go with a beta of their own.
_LOGIN_TOKEN = "sk-ant-oat"  # noqa: S105

_LOGIN_BETA = "oauth-2025-04-20"


@dataclass(frozen=True)
class DirectTarget:
    """How one model is called directly, with its secrets resolved."""

    name: str
    head: RequestHead = field(repr=False)
    model: str
    param_aliases: Mapping[str, str]
    model_params: Mapping[str, Any] | None = field(repr=False)
    """The model's own parameters, if any of them goes into the body."""
    secrets: frozenset[str] = field(repr=False)
    api: DirectAPI = "chat"
    is_anthropics: bool = False
    """Whether it is Anthropic's own."""

    def render_head(self, headers: Mapping[str, str]) -> bytes:
        """Encode the head of a request with the caller's headers; those for Anthropic reach Anthropic alone."""
        return self.head.render(headers if self.api == "chat" else self._without_versions(headers))

    def _without_versions(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Leave out the caller's version and betas of Anthropic's API, or add them to the model's own."""
        headers = {name.lower(): text for name, text in headers.items()}
        kept = {name: text for name, text in headers.items() if not name.startswith("anthropic-")}
        if self.api != "messages" or not self.is_anthropics:
            return kept
        version, own = headers.get("anthropic-version", ""), self.head.headers
        if own["anthropic-version"] == ANTHROPIC_VERSION and _VERSION.fullmatch(version):
            kept["anthropic-version"] = version
        stated = f"{own.get('anthropic-beta', '')},{headers.get('anthropic-beta', '')}".split(",")
        betas = dict.fromkeys(beta for each in stated if _BETA.fullmatch(beta := each.strip()))
        if betas:
            kept["anthropic-beta"] = ",".join([*betas][:_MAX_BETAS])
        return kept

    def build_body(
        self, body: Mapping[str, Any], raw: bytes | None, *, stream: bool, include_usage: bool = True
    ) -> bytes:
        """Encode the body of a request.

        Args:
            raw: the bytes that `body` was parsed from; None if it differs, or was made here.
        """
        sent = body if self.model_params is None else merge_model_params(self.model_params, body)
        if not self.param_aliases.keys().isdisjoint(sent):
            sent = self._with_aliases(sent)
        raw = raw if sent is body else None
        return build_body(raw, sent, self.model, stream=stream, include_usage=include_usage)

    def _with_aliases(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Rename fields to the provider's names. If a field has a value under both names, the provider's counts."""
        sent = {name: value for name, value in body.items() if name not in self.param_aliases}
        for name, other in self.param_aliases.items():
            if body.get(name) is not None and sent.get(other) is None:
                sent[other] = body[name]
        return sent


# Parameters of a model with headers for its requests. Of a header that both have, the latter counts.
_HEADER_PARAMS = ("extra_headers", "headers")


class DirectTargets:
    """Make the target of each model at its first call, and again when its record has changed."""

    def __init__(self, settings: Settings, environ: Mapping[str, str], outbound: Outbound) -> None:
        self._settings = settings
        self._environ = environ
        self._outbound = outbound
        self._targets: dict[tuple[str, DirectAPI], tuple[ModelRecord, DirectTarget]] = {}

    def get(self, record: ModelRecord, resolved: ResolvedProvider, api: DirectAPI = "chat") -> DirectTarget:
        """Return the target of a model for one of the APIs that it speaks.

        Raises:
            UpstreamError: a key is missing, or the address cannot be used.
        """
        cached = self._targets.get((record.name, api))
        if cached is not None and cached[0] is record:
            return cached[1]
        try:
            target = self._make(record, resolved, api)
        except SettingsError as error:
            log.error("model %s: %s", record.name, error)
            raise UpstreamError(f"{record.name}: this server has no key for it", retryable=True) from None
        except (OutboundError, ValueError) as error:
            log.error("model %s: %s", record.name, error)
            raise unreachable(error, record.name) from None
        self._targets[record.name, api] = (record, target)
        return target

    def retain(self, models: Mapping[str, ModelRecord]) -> None:
        """Keep only the targets of models that are registered and unchanged."""
        self._targets = {key: cached for key, cached in self._targets.items() if models.get(key[0]) is cached[0]}

    def _make(self, record: ModelRecord, resolved: ResolvedProvider, api: DirectAPI) -> DirectTarget:
        params = record.litellm_params
        if stated := stated_address(params):
            base = self._resolve(stated)
        elif resolved.api_base:
            base = restore_credentials(resolved.api_base, resolved.provider, self._environ)
        else:
            base = own_base(resolved.provider, self._environ)
        anthropics = is_anthropics(params, resolved)
        key = self._key(params, resolved if api == "chat" else _with_key_variable(resolved, params))
        own_headers = {
            param: {name: self._resolve(text) for name, text in (params.get(param) or {}).items()}
            for param in _HEADER_PARAMS
        }
        headers = {"content-type": "application/json", "accept-encoding": "identity", "user-agent": "uniroute"}
        headers |= _key_headers(key or "", api, anthropics=anthropics)
        if params.get("organization") and api != "messages":
            headers["openai-organization"] = self._resolve(params["organization"])
        url = url_of(base, api)
        trust = self._trust(params) if url.startswith("https:") else DEFAULT_TRUST
        for each in own_headers.values():
            headers |= {name.lower(): text for name, text in each.items()}
        return DirectTarget(
            name=record.name,
            head=build_head(url, headers, self._outbound.proxies.for_url(url), trust),
            model=resolved.model,
            param_aliases=resolved.param_aliases,
            model_params=params if record.has_body_params else None,
            secrets=secrets_of({**params, "api_key": key, "api_base": base, **own_headers}, key),
            api=api,
            is_anthropics=anthropics,
        )

    def _trust(self, params: Mapping[str, Any]) -> Trust:
        """Return which certificates are trusted. Raises OutboundError."""
        stated = params.get("ssl_verify")
        return self._outbound.trust_of(self._resolve(stated) if isinstance(stated, str) else stated)

    def _key(self, params: Mapping[str, Any], resolved: ResolvedProvider) -> str | None:
        """Return the model's own key, or else the environment's if requests go to the provider's own address."""
        if params.get("api_key"):
            return self._resolve(params["api_key"])
        address = stated_address(params)
        if address and not (resolved.own_address or is_openai_url(address)):
            return None  # even if there is a `key_variable`: an older version may have stored one
        variable = resolved.key_variable
        name = referred_variable(f"os.environ/{variable}") if variable else None
        return self._environ.get(name) if name else None

    def _resolve(self, stated: str) -> str:
        """Return a parameter's value, with a reference to the environment replaced by what it refers to."""
        return resolve_secret(stated, self._environ, self._settings.allowed_env)


# Variables of the keys of providers whose own API may be spoken without litellm.
_KEY_VARIABLES = {"anthropic": "ANTHROPIC_API_KEY", "openai": "OPENAI_API_KEY"}


def _with_key_variable(resolved: ResolvedProvider, params: Mapping[str, Any]) -> ResolvedProvider:
    """Name the variable of the key, which is not looked up for providers that litellm calls."""
    if resolved.key_variable or (stated_address(params) and not resolved.own_address):
        return resolved
    return replace(resolved, key_variable=_KEY_VARIABLES.get(resolved.provider))


def _key_headers(key: str, api: DirectAPI, *, anthropics: bool) -> dict[str, str]:
    """Return the headers of a key, and of the version of Anthropic's API.

    Other servers of that API look for a key in either of two headers.
    """
    bearer = {"authorization": f"Bearer {key}"} if key else {}
    if api != "messages":
        return bearer
    version = {"anthropic-version": ANTHROPIC_VERSION}
    if anthropics and key.startswith(_LOGIN_TOKEN):
        return {**version, **bearer, "anthropic-beta": _LOGIN_BETA}
    named = {"x-api-key": key} if key else {}
    return {**version, **named} if anthropics else {**version, **named, **bearer}


# Below the address of a model.
_PATHS: Mapping[DirectAPI, str] = {
    "chat": "/chat/completions",
    "responses": "/responses",
    "messages": "/v1/messages",
    "embeddings": "/embeddings",
}

# With which an address may end, though the path of a request begins with it or replaces it.
_ENDS: Mapping[DirectAPI, tuple[str, ...]] = {
    "chat": ("/chat/completions",),
    "responses": ("/responses", "/chat/completions"),
    "messages": ("/messages", "/chat/completions", "/v1"),
    "embeddings": ("/embeddings", "/chat/completions"),
}


def url_of(base: str, api: DirectAPI = "chat") -> str:
    """Return the address of an API below `base`. Its query stays."""
    address, mark, query = base.partition("?")
    path = address.rstrip("/")
    for end in _ENDS[api]:
        path = path.removesuffix(end)
    return path + _PATHS[api] + mark + query
