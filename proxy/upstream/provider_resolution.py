from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from proxy.errors import BadRequest, ServiceUnavailable
from proxy.settings.litellm_params import PASSTHROUGH, is_openai_url, is_provider_param, stated_address
from proxy.settings.model_config import Forward, SettingsError
from proxy.settings.redaction import strip_url
from proxy.storage.records import InvalidRecord, ModelRecord, ResolvedProvider
from proxy.upstream.key_scope import address_variables, check_environment_key
from proxy.upstream.litellm_resolver import Answers, LookupFailed, ProviderLookup, params_for_litellm

log = logging.getLogger("uniroute.upstream")

CACHE_FILE = "providers.json"

# Of what an answer in the cache holds. Answers of another version are asked again.
CACHE_VERSION = 3

MAX_CACHED = 2000


def resolve_static(params: Mapping[str, Any], forward: Forward) -> ResolvedProvider | None:
    """Resolve a server of OpenAI's format with an address of its own, by its provider's name alone.

    Returns:
        None: litellm has to be asked.
    """
    address, (prefix, _, bare) = stated_address(params), str(params["model"]).partition("/")
    provider = params.get("custom_llm_provider") or prefix
    if provider not in PASSTHROUGH or not address or is_openai_url(address) or not bare:
        return None
    needs_litellm = bool(params_for_litellm(filter(is_provider_param, params)))
    if forward == "relay" and needs_litellm:
        return None  # the lookup refuses it, and says why
    model = bare if prefix == provider else params["model"]
    return ResolvedProvider(
        "translate" if forward == "translate" or needs_litellm else "relay", model, provider, address
    )


def cache_query(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that litellm's answer depends on, and no secret: names of parameters, and values of three."""
    address = stated_address(params)
    return {
        "model": params["model"],
        "api_base": strip_url(address) if address else address,
        "custom_llm_provider": params.get("custom_llm_provider"),
        "stated": sorted(name for name in params if is_provider_param(name)),
    }


class Resolver:
    """Find which provider serves a model, and keep what litellm said in a file."""

    def __init__(self, data_dir: Path, environ: Mapping[str, str]) -> None:
        self._path = data_dir / CACHE_FILE
        self._environ = environ
        lock = self._path.with_suffix(".turn")
        self._lookup = ProviderLookup(lock, self._child_environment, self._cached, self._store_in_thread, _is_answer)
        # litellm reads these too. Nothing else of `environ` is handed on.
        self._addresses = {name: strip_url(value) for name, value in address_variables(environ).items()}

    @property
    def waiting(self) -> int:
        """How many models wait for the lookup of their provider."""
        return self._lookup.pending

    async def aclose(self) -> None:
        await self._lookup.aclose()

    async def resolve(self, record: ModelRecord) -> ModelRecord:
        """Return the record with `resolved`.

        Raises:
            BadRequest: no provider is known by the model's name, or not in the way that was asked for, or the key of
                the environment for it would go elsewhere.
            ServiceUnavailable: litellm could not be asked.
        """
        try:
            if self.waiting:
                log.info("the provider of %s is looked up after those of %d other models", record.name, self.waiting)
            (found,) = await self._resolve([record])
        except LookupFailed as error:
            raise ServiceUnavailable(f"the provider of {record.name} could not be looked up: {error}") from error
        if isinstance(found, str):
            raise BadRequest(f"{record.name}: {found}", param="litellm_params.model")
        resolved = replace(record, resolved=found)
        check_environment_key(resolved, self._environ)
        return resolved

    async def resolve_all(self, records: Iterable[ModelRecord]) -> list[ModelRecord]:
        """Resolve the records at once. Log and leave unresolved what cannot be resolved.

        Raises:
            SettingsError: the key of the environment for one of them would go elsewhere.
        """
        records = list(records)
        try:
            found = await self._resolve(records)
        except LookupFailed as error:
            log.warning("providers could not be looked up, models are translated: %s", error)
            found = [resolve_static(record.litellm_params, record.info.forward) or str(error) for record in records]
        resolved = []
        for record, each in zip(records, found, strict=True):
            if isinstance(each, str):
                log.error("model %s: %s", record.name, each)
            resolved.append(replace(record, resolved=each) if isinstance(each, ResolvedProvider) else record)
        try:
            for record in resolved:
                check_environment_key(record, self._environ)
        except BadRequest as error:
            raise SettingsError(error.message) from None
        return resolved

    async def _resolve(self, records: Sequence[ModelRecord]) -> list[ResolvedProvider | str]:
        """Return what each was resolved to, or why it is refused. Raises LookupFailed."""
        static = [resolve_static(record.litellm_params, record.info.forward) for record in records]
        queries = [
            {**cache_query(record.litellm_params), "forward": record.info.forward}
            for record, found in zip(records, static, strict=True)
            if found is None
        ]
        answers = iter(await self._ask_litellm(queries) if queries else [])
        return [next(answers) if found is None else found for found in static]

    async def _ask_litellm(self, queries: Sequence[Mapping[str, Any]]) -> list[ResolvedProvider | str]:
        keys = [self._cache_key(query) for query in queries]
        answers = self._cached()
        missing = {key: query for key, query in zip(keys, queries, strict=True) if key not in answers}
        if missing:
            answers |= await self._lookup.lookup(missing)
        return [_parse_answer(answers[key]) for key in keys]

    def _child_environment(self) -> dict[str, str]:
        """Return an environment without keys and .env files, so that litellm says which keys it would look for."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH", "TMPDIR") if name in os.environ}
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), kept.get("PYTHONPATH"))))
        return {**self._addresses, **kept, "PYTHONPATH": path, "LITELLM_MODE": "PRODUCTION"}

    def _cache_key(self, query: Mapping[str, Any]) -> str:
        text = json.dumps([CACHE_VERSION, version("litellm"), self._addresses, query], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def _cached(self) -> dict[str, Any]:
        try:
            cached = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        return {key: each for key, each in cached.items() if _is_answer(each)} if isinstance(cached, dict) else {}

    async def _store_in_thread(self, answers: Answers) -> None:
        await asyncio.to_thread(self._store, answers)

    def _store(self, answers: Answers) -> None:
        """Add the answers to those that other processes have stored meanwhile."""
        try:
            with _exclusive(self._path.with_suffix(".lock")):
                cached = [*self._cached().items(), *answers.items()][-MAX_CACHED:]
                written = self._path.with_suffix(".new")
                written.write_text(json.dumps(dict(cached)), "utf-8")
                written.replace(self._path)
        except OSError as error:
            log.warning("providers are looked up again at the next start: %s", error)


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file of something that one process writes at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_answer(stored: Any) -> bool:
    """Return False for what a broken file or another version left."""
    try:
        _parse_answer(stored)
    except InvalidRecord:
        return False
    return True


def _parse_answer(answer: Any) -> ResolvedProvider | str:
    """Return what the provider was resolved to, or why it is refused. Raises InvalidRecord."""
    if isinstance(answer, dict) and isinstance(answer.get("refused"), str):
        return str(answer["refused"])
    return ResolvedProvider.from_json(answer.get("resolved") if isinstance(answer, dict) else None)
