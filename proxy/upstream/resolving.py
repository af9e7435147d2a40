"""Finding out once which way each model is reached, and keeping it in the data directory."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from proxy.errors import BadRequest, Unavailable
from proxy.settings.models import SettingsError
from proxy.storage.models import ModelRecord, Resolved
from proxy.storage.redis import InvalidRecord
from proxy.upstream.lookup import Found, Lookup, NotAsked, alone
from proxy.upstream.origins import check_environment_key
from proxy.upstream.resolution import plainly, questions

log = logging.getLogger("uniroute.upstream")

FILE = "providers.json"
FORMAT = 2
"""What an answer holds: those of another one are asked again."""
MOST_KEPT = 2000


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
            raise Unavailable(f"the provider of {record.name} could not be looked up: {error}") from error
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
            found = [plainly(record.litellm_params, record.info.forward) or str(error) for record in known]
        for record, each in zip(known, found, strict=True):
            if isinstance(each, str):
                log.error("model %s: %s", record.name, each)
        pairs = zip(known, found, strict=True)
        resolved = [replace(record, resolved=each) if isinstance(each, Resolved) else record for record, each in pairs]
        try:
            for record in resolved:
                check_environment_key(record, self._environ)
        except BadRequest as error:
            raise SettingsError(error.message) from None
        return resolved

    async def _found(self, records: Sequence[ModelRecord]) -> list[Resolved | str]:
        """What each was resolved to, or why it cannot be. Raises NotAsked."""
        plain = [plainly(record.litellm_params, record.info.forward) for record in records]
        asked = [
            {**questions(record.litellm_params), "forward": record.info.forward}
            for record, found in zip(records, plain, strict=True)
            if found is None
        ]
        answers = iter(await self._answers(asked) if asked else [])
        return [next(answers) if found is None else found for found in plain]

    async def _answers(self, asked: Sequence[Mapping[str, Any]]) -> list[Resolved | str]:
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
                kept = [*self._kept().items(), *found.items()][-MOST_KEPT:]
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


def _read(answer: Any) -> Resolved | str:
    """What it was resolved to, or why it is refused. Raises InvalidRecord."""
    if isinstance(answer, dict) and isinstance(answer.get("refused"), str):
        return str(answer["refused"])
    return Resolved.from_json(answer.get("resolved") if isinstance(answer, dict) else None)
