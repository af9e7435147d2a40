"""Where a relayed model is: its address, the headers it is called with, what a caller's body becomes. No I/O."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from proxy.errors import UpstreamFailure
from proxy.outbound import USUAL, Outbound, OutboundError, Trust
from proxy.settings.models import SettingsError, referred_variable, resolve_secret
from proxy.settings.schema import Settings
from proxy.storage.models import ModelRecord, Resolved
from proxy.upstream.call import arm_body, fixes_parameters, is_openais, secrets_of
from proxy.upstream.failures import unreachable
from proxy.upstream.heads import Heads, heads_of
from proxy.upstream.origins import address_of
from proxy.upstream.request_bytes import outgoing

log = logging.getLogger("uniroute.upstream")

PATH = "/chat/completions"
_OWN_HEADERS = ("extra_headers", "headers")


@dataclass(frozen=True)
class Target:
    """One relayed model, its secrets resolved."""

    name: str
    heads: Heads = field(repr=False)
    model: str
    renames: Mapping[str, str]
    fixed: Mapping[str, Any] | None = field(repr=False)
    """The model's parameters, where some of them are for the body."""
    secrets: frozenset[str] = field(repr=False)

    def body(self, body: Mapping[str, Any], raw: bytes | None, *, stream: bool, asks_usage: bool = True) -> bytes:
        """`raw`: what `body` was parsed from, if all of it is for the upstream."""
        sent = body if self.fixed is None else arm_body(self.fixed, body)
        if not self.renames.keys().isdisjoint(sent):
            sent = self._renamed(sent)
        return outgoing(raw if sent is body else None, sent, self.model, stream=stream, asks_usage=asks_usage)

    def _renamed(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Of two names for one thing the one that says something counts; where both do, the provider's own."""
        sent = {name: value for name, value in body.items() if name not in self.renames}
        for name, other in self.renames.items():
            if body.get(name) is not None and sent.get(other) is None:
                sent[other] = body[name]
        return sent


class Targets:
    """Made when a model is first asked, and again when its record is another."""

    def __init__(self, settings: Settings, environ: Mapping[str, str], outbound: Outbound) -> None:
        self._settings = settings
        self._environ = environ
        self._outbound = outbound
        self._made: dict[str, tuple[ModelRecord, Target]] = {}

    def of(self, record: ModelRecord, resolved: Resolved) -> Target:
        """Raises UpstreamFailure where a key or an address is missing."""
        made = self._made.get(record.name)
        if made is not None and made[0] is record:
            return made[1]
        try:
            target = self._target(record, resolved)
        except SettingsError as error:
            log.error("model %s: %s", record.name, error)
            raise UpstreamFailure(f"{record.name}: this server has no key for it", retryable=True) from None
        except (OutboundError, ValueError) as error:
            log.error("model %s: %s", record.name, error)
            raise unreachable(error, record.name) from None
        self._made[record.name] = (record, target)
        return target

    def forget_others(self, models: Mapping[str, ModelRecord]) -> None:
        self._made = {name: made for name, made in self._made.items() if models.get(name) is made[0]}

    def _target(self, record: ModelRecord, resolved: Resolved) -> Target:
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
        return Target(
            name=record.name,
            heads=heads_of(url, headers, self._outbound.proxies.of(url), trust),
            model=resolved.model,
            renames=resolved.renames,
            fixed=params if fixes_parameters(params) else None,
            secrets=secrets_of({**params, "api_key": key, "api_base": base, **own}, key),
        )

    def _trust(self, params: Mapping[str, Any]) -> Trust:
        """Raises OutboundError."""
        stated = params.get("ssl_verify")
        return self._outbound.trust_of(self._value(stated) if isinstance(stated, str) else stated)

    def _key(self, params: Mapping[str, Any], resolved: Resolved) -> str | None:
        if params.get("api_key"):
            return self._value(params["api_key"])
        address = address_of(params)
        if address and not (resolved.own_address or is_openais(address)):
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
