from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from proxy.errors import BadRequest, ServiceUnavailable
from proxy.safety.redaction import bare_address
from proxy.settings.models import Forward, SettingsError
from proxy.storage.models import ModelRecord, ResolvedProvider
from proxy.storage.values import InvalidRecord
from proxy.upstream.litellm.params import FOLLOWS_REDIRECTS, VERBATIM, is_openai_url, is_provider_param
from proxy.upstream.origins import DEFAULT_BASES, address_of, check_environment_key, is_own_address
from proxy.upstream.provider_lookup import Found, Lookup, NotAsked, alone
from proxy.words import words

OPENAI_COMPATIBLE = VERBATIM | words("azure deepseek fireworks_ai groq mistral openrouter together_ai xai")
"""Providers that read OpenAI's chat completions and answer in them: `auto` relays to these."""

DIRECT_PARAMS = words("api_base base_url api_key organization custom_llm_provider extra_headers headers ssl_verify")
"""Parameters of a model that a relayed call has a place for. Whoever states others wants litellm's handling."""

LIMITS = ("max_tokens", "max_completion_tokens")

_PROBE = 7


class NotResolved(ValueError):
    """No provider is known by this name, or not one that can be reached in the way that was asked for."""


def cache_query(params: Mapping[str, Any]) -> dict[str, Any]:
    """What the answer depends on, and no secret: names of parameters, values of three."""
    address = address_of(params)
    return {
        "model": params["model"],
        "api_base": bare_address(address) if address else address,
        "custom_llm_provider": params.get("custom_llm_provider"),
        "stated": sorted(name for name in params if is_provider_param(name)),
    }


def resolve_static(params: Mapping[str, Any], forward: Forward) -> ResolvedProvider | None:
    """Of a server with an address that reads OpenAI's format, as its provider's name says. None: ask litellm."""
    address, (prefix, _, bare) = address_of(params), str(params["model"]).partition("/")
    provider = params.get("custom_llm_provider") or prefix
    if provider not in VERBATIM or not address or is_openai_url(address) or not bare:
        return None
    without_place = _without_place(filter(is_provider_param, params))
    if forward == "relay" and without_place:
        return None  # it is refused there
    model = bare if prefix == provider else params["model"]
    translated = forward == "translate" or bool(without_place)
    return ResolvedProvider("translate" if translated else "relay", model, provider, address)


def resolve_with_litellm(litellm: Any, asked: Mapping[str, Any], forward: Forward) -> ResolvedProvider:
    """Raises NotResolved, and what litellm raises."""
    model, provider, _, base = litellm.get_llm_provider(
        asked["model"], custom_llm_provider=asked["custom_llm_provider"], api_base=asked["api_base"]
    )
    if provider in FOLLOWS_REDIRECTS:
        raise NotResolved(f"{provider} is not served, for it follows redirects")
    compatible = provider in OPENAI_COMPATIBLE or provider in litellm.openai_compatible_providers
    base = asked["api_base"] or (base or DEFAULT_BASES.get(provider) if compatible else None)
    own = not asked["api_base"] or is_own_address(asked["api_base"], provider, _default(litellm, asked), os.environ)
    if forward == "translate" or not _is_relayed(provider, base, asked["stated"], forward):
        return ResolvedProvider("translate", model, provider, own_address=own and bool(asked["api_base"]))
    key = _key_variable(litellm, model, provider) if own else None
    return ResolvedProvider("relay", model, provider, base, key, _renames(litellm, model, provider), own)


def _default(litellm: Any, asked: Mapping[str, Any]) -> str | None:
    base: str | None = litellm.get_llm_provider(asked["model"], custom_llm_provider=asked["custom_llm_provider"])[3]
    return base


def _is_relayed(provider: str, base: str | None, stated: Collection[str], forward: Forward) -> bool:
    if forward == "relay":
        if not base:
            raise NotResolved(
                f"forward: relay needs api_base: {provider} has no address that is known to speak OpenAI's"
            )
        if without_place := _without_place(stated):
            raise NotResolved(
                f"forward: relay has no place for litellm_params.{without_place[0]}; leave one of them out"
            )
        return True
    if provider == "azure" and "/openai/v1" not in (base or ""):
        return False  # the older interface, with deployments and versions in the path
    return provider in OPENAI_COMPATIBLE and bool(base) and not _without_place(stated)


def _without_place(stated: Iterable[str]) -> list[str]:
    """Parameters for the provider that only litellm can do something with."""
    return sorted(set(stated) - DIRECT_PARAMS)


def _key_variable(litellm: Any, model: str, provider: str) -> str | None:
    """Where litellm would look for a key, were there none; only known while no key is in the environment."""
    missing: list[str] = litellm.validate_environment(f"{provider}/{model}")["missing_keys"]
    named = [name for name in missing if name.endswith("_API_KEY")]  # bedrock's are no keys of this kind
    return next((name for name in named if name.startswith(provider.upper())), named[0] if named else None)


def _renames(litellm: Any, model: str, provider: str) -> dict[str, str]:
    """What the provider calls OpenAI's limits of an answer."""
    import openai

    found = {}
    for name, other in (LIMITS, LIMITS[::-1]):
        with suppress(openai.OpenAIError):  # it knows no such field at all
            sent = litellm.get_optional_params(model=model, custom_llm_provider=provider, **{name: _PROBE})
            if sent.get(other) == _PROBE:
                found[name] = other
    return found


log = logging.getLogger("uniroute.upstream")

FILE = "providers.json"

FORMAT = 2
"""What an answer holds: those of another one are asked again."""

MAX_CACHED = 2000


class Resolver:
    """`environ`: of it the addresses alone, which litellm reads too, are handed on."""

    def __init__(self, data_dir: Path, environ: Mapping[str, str]) -> None:
        self._path = data_dir / FILE
        self._environ = environ
        lock = self._path.with_suffix(".turn")
        self._lookup = Lookup(lock, self._environment, self._kept, self._keep_found, _is_answer)
        self._addresses = {name: value for name, value in environ.items() if name.endswith(("_API_BASE", "_BASE_URL"))}

    @property
    def waiting(self) -> int:
        """Models whose provider is being looked up."""
        return self._lookup.waiting

    async def aclose(self) -> None:
        await self._lookup.aclose()

    async def resolve(self, record: ModelRecord) -> ModelRecord:
        """With `resolved`.

        Raises:
            BadRequest: no provider is known by the model's name, or not in the way that was asked for, or the key of
                the environment for it would go elsewhere.
            Unavailable: litellm could not be asked.
        """
        try:
            if self.waiting:
                log.info("the provider of %s is looked up after those of %d other models", record.name, self.waiting)
            (found,) = await self._found([record])
        except NotAsked as error:
            raise ServiceUnavailable(f"the provider of {record.name} could not be looked up: {error}") from error
        if isinstance(found, str):
            raise BadRequest(f"{record.name}: {found}", param="litellm_params.model")
        found_record = replace(record, resolved=found)
        check_environment_key(found_record, self._environ)
        return found_record

    async def resolve_all(self, records: Iterable[ModelRecord]) -> list[ModelRecord]:
        """Those that cannot be resolved stay as they are, and what is wrong with them is logged.

        Raises:
            SettingsError: the key of the environment for one of them would go elsewhere.
        """
        known = list(records)
        try:
            found = await self._found(known)
        except NotAsked as error:
            log.warning("providers could not be looked up, models are translated: %s", error)
            found = [resolve_static(record.litellm_params, record.info.forward) or str(error) for record in known]
        for record, each in zip(known, found, strict=True):
            if isinstance(each, str):
                log.error("model %s: %s", record.name, each)
        pairs = zip(known, found, strict=True)
        resolved = [
            replace(record, resolved=each) if isinstance(each, ResolvedProvider) else record for record, each in pairs
        ]
        try:
            for record in resolved:
                check_environment_key(record, self._environ)
        except BadRequest as error:
            raise SettingsError(error.message) from None
        return resolved

    async def _found(self, records: Sequence[ModelRecord]) -> list[ResolvedProvider | str]:
        """What each was resolved to, or why it cannot be. Raises NotAsked."""
        plain = [resolve_static(record.litellm_params, record.info.forward) for record in records]
        asked = [
            {**cache_query(record.litellm_params), "forward": record.info.forward}
            for record, found in zip(records, plain, strict=True)
            if found is None
        ]
        answers = iter(await self._answers(asked) if asked else [])
        return [next(answers) if found is None else found for found in plain]

    async def _answers(self, asked: Sequence[Mapping[str, Any]]) -> list[ResolvedProvider | str]:
        marks = [self._mark(each) for each in asked]
        kept = self._kept()
        missing = {mark: each for mark, each in zip(marks, asked, strict=True) if mark not in kept}
        if missing:
            kept |= await self._lookup.answers(missing)
        return [_read(kept[mark]) for mark in marks]

    def _environment(self) -> dict[str, str]:
        """No keys, nor what litellm would read of a .env file: so it says which keys it would look for."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH", "TMPDIR") if name in os.environ}
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), kept.get("PYTHONPATH"))))
        return {**self._addresses, **kept, "PYTHONPATH": path, "LITELLM_MODE": "PRODUCTION"}

    def _mark(self, asked: Mapping[str, Any]) -> str:
        text = json.dumps([FORMAT, version("litellm"), self._addresses, asked], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def _kept(self) -> dict[str, Any]:
        try:
            kept = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        return {mark: each for mark, each in kept.items() if _is_answer(each)} if isinstance(kept, dict) else {}

    async def _keep_found(self, found: Found) -> None:
        await asyncio.to_thread(self._keep, found)

    def _keep(self, found: Mapping[str, Any]) -> None:
        """Beside what other processes have found meanwhile."""
        try:
            with alone(self._path.with_suffix(".lock")):
                kept = [*self._kept().items(), *found.items()][-MAX_CACHED:]
                written = self._path.with_suffix(".new")
                written.write_text(json.dumps(dict(kept)), "utf-8")
                written.replace(self._path)
        except OSError as error:
            log.warning("providers are looked up again at the next start: %s", error)


def _is_answer(kept: Any) -> bool:
    """Not what a broken file or another version left."""
    try:
        _read(kept)
    except InvalidRecord:
        return False
    return True


def _read(answer: Any) -> ResolvedProvider | str:
    """What it was resolved to, or why it is refused. Raises InvalidRecord."""
    if isinstance(answer, dict) and isinstance(answer.get("refused"), str):
        return str(answer["refused"])
    return ResolvedProvider.from_json(answer.get("resolved") if isinstance(answer, dict) else None)
