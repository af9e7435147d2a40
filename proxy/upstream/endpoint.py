"""Keep each key to the provider and the address that it was stated for.

A key that a model states is for that model's provider, scheme, host and port. A change of any of them needs it stated
again. A key that the environment holds for a provider is for the provider's own address alone.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

import orjson

from proxy.errors import BadRequest, UpstreamError
from proxy.settings.litellm_params import (
    PASSTHROUGH,
    is_openai_url,
    is_provider_param,
    merge_model_params,
    secrets_of,
    stated_address,
)
from proxy.settings.models import SettingsError, referred_variable, resolve_secret
from proxy.settings.outbound import DEFAULT_TRUST, Outbound, OutboundError, Trust
from proxy.settings.redaction import holds_secret, is_reference
from proxy.settings.schema import Settings
from proxy.storage.models import ModelRecord, ResolvedProvider
from proxy.upstream.errors import unreachable
from proxy.upstream.payload import replace_model
from proxy.upstream.pool import DEFAULT_PORTS, Origin, authority_of, basic_auth_of, port_of
from proxy.upstream.sse import encode_json

# Where litellm goes by default, for providers of OpenAI's format.
DEFAULT_BASES = {"openai": "https://api.openai.com/v1", "openrouter": "https://openrouter.ai/api/v1"}

_OTHER_BASES = {
    "anthropic": "https://api.anthropic.com",
    "cohere": "https://api.cohere.com",
    "cohere_chat": "https://api.cohere.com",
    "gemini": "https://generativelanguage.googleapis.com",
    "ollama": "http://localhost:11434",
    "ollama_chat": "http://localhost:11434",
}

_OWN_HOSTS = {"vertex_ai": ".googleapis.com", "bedrock": ".amazonaws.com", "sagemaker": ".amazonaws.com"}

# Providers for which litellm finds credentials in more places than variables: files, metadata services, logins.
_AMBIENT_CREDENTIALS = re.compile(
    r"(azure|bedrock|databricks|gigachat|github|oci|sagemaker|sap|snowflake|vertex|watsonx).*"
)

# Given as a key so that litellm looks up none.
PLACEHOLDER_KEY = "-"

_ADDRESS = re.compile(r"(.*_)?(api_base|base_url|endpoint|auth_url|url|host)")

_PORTS = {"http": 80, "https": 443}

ADDRESSES = ("api_base", "base_url")

KeyOrigin = tuple[str, str, int | None]


def origin_of(address: str) -> KeyOrigin:
    """Return scheme, host and port. Text that is no address is an origin of its own."""
    try:
        parts = urlsplit(address)
        port = parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        return ("", address, None)
    host = parts.hostname or ""
    return (parts.scheme, host.rstrip(".") if host else address, port)


def is_own_address(address: str, provider: str, default: str | None, environ: Mapping[str, str]) -> bool:
    """Return whether the environment's key of this provider may be sent to an address.

    Args:
        default: where litellm goes for this provider if no address is stated; None if that is not known.
        environ: an address that it states for the provider counts as the provider's own.
    """
    if provider == "openai" and is_openai_url(address):
        return True
    prefix = provider.upper()
    named = [environ.get(f"{prefix}_{suffix}") for suffix in ("API_BASE", "BASE_URL")]
    known = [default, DEFAULT_BASES.get(provider), _OTHER_BASES.get(provider), *named]
    scheme, host, _ = origin = origin_of(address)
    below = _OWN_HOSTS.get(provider.partition("_")[0]) or _OWN_HOSTS.get(provider)
    return origin in [origin_of(each) for each in known if each] or (
        below is not None and scheme == "https" and host.endswith(below)
    )


def stated_secrets(params: Mapping[str, Any]) -> list[str]:
    """Return the parameters for the provider that are or hold secrets: a key, a header with a key, a reference."""
    return [
        name
        for name, value in params.items()
        if is_provider_param(name) and name not in ADDRESSES and holds_secret(name, value)
    ]


def key_for_litellm(
    params: Mapping[str, Any], provider: str, default: str | None, environ: Mapping[str, str]
) -> str | None:
    """Choose the key to give litellm, so that it looks up none for an address that is not the provider's own.

    Returns:
        None: litellm may look one up, or needs none.

    Raises:
        OutboundError: litellm would look up the provider's credentials whatever key it is given.
    """
    stated, address = params.get("api_key"), stated_address(params)
    if stated or not address or is_own_address(address, provider, default, environ):
        return stated or None
    if _AMBIENT_CREDENTIALS.fullmatch(provider) and not stated_secrets(params):
        raise OutboundError(
            f"the environment's credentials are for {provider}'s own address, and not sent to another; state those for"
            " api_base in litellm_params"
        )
    if provider.startswith("ollama") and not environ.get("OLLAMA_API_KEY"):
        return None
    return PLACEHOLDER_KEY


def check_environment_key(record: ModelRecord, environ: Mapping[str, str]) -> None:
    """Refuse a model for which litellm would send the environment's key to another address. Raises BadRequest."""
    params, resolved = record.litellm_params, record.resolved
    if resolved is None or resolved.own_address or not stated_address(params):
        return
    if params.get("api_key") or stated_secrets(params):
        return
    if resolved.provider in PASSTHROUGH or not (found := _variable_of(resolved.provider, environ)):
        return
    raise BadRequest(
        f"{record.name}: {found} is for {resolved.provider}'s own address, and is not sent to another: state `api_key:"
        f" os.environ/{found}` to send it to api_base, or `api_key: none` if no key is needed there",
        param="litellm_params.api_key",
    )


def _variable_of(provider: str, environ: Mapping[str, str]) -> str | None:
    plain = provider.replace("_", "").upper()
    for name in sorted(environ):
        stem = name.removesuffix("_API_KEY").replace("_", "")
        if name.endswith("_API_KEY") and stem and environ[name] and plain.startswith(stem):
            return name
    return None


def check_secrets_stay(before: ModelRecord, after: ModelRecord, stated: Mapping[str, Any]) -> None:
    """Refuse a change that would send a secret elsewhere, unless the change states that secret again.

    Args:
        stated: the litellm_params of the change itself.

    Raises:
        BadRequest: names the secret and what moved.
    """
    moved = _moved(before, after)
    if moved is None:
        return
    for name in stated_secrets(after.litellm_params):
        if name not in stated:
            raise BadRequest(
                f"`litellm_params.{moved}` changes where `{name}` is sent: state `{name}` again in the same change, or"
                " null to drop it",
                param=f"litellm_params.{name}",
            )


def _moved(before: ModelRecord, after: ModelRecord) -> str | None:
    """Return the parameter whose change leads to another origin or provider."""
    old, new = before.litellm_params, after.litellm_params
    for name in sorted({*old, *new}):
        address = is_provider_param(name) and _ADDRESS.fullmatch(name)
        if address and _stated_origin(old.get(name)) != _stated_origin(new.get(name)):
            return name
    if old.get("custom_llm_provider") != new.get("custom_llm_provider"):
        return "custom_llm_provider"
    return "model" if _changes_provider(before, after) else None


def _stated_origin(address: Any) -> Any:
    return origin_of(address) if isinstance(address, str) and not is_reference(address) else address


def _changes_provider(before: ModelRecord, after: ModelRecord) -> bool:
    if before.litellm_params["model"] == after.litellm_params["model"]:
        return False
    if after.resolved is None:  # it is compared again once that is known
        old, new = _prefix(before), _prefix(after)
        return old is not None and new is not None and old != new
    known = before.resolved.provider if before.resolved is not None else _prefix(before)
    return known != after.resolved.provider


def _prefix(record: ModelRecord) -> str | None:
    prefix, slash, _ = str(record.litellm_params["model"]).partition("/")
    return prefix if slash else None


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
