"""One JSON object that an upstream said, parsed and as it was written. Changes its `model` and nothing else."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Never

import orjson

from proxy.relay.sse import dump, loads
from proxy.safety.json_shape import MAX_VALUES_AT_ONCE, SHALLOW, check_shape
from proxy.upstream.answer_room import Held
from proxy.upstream.model_member import with_model


@dataclass(slots=True)
class Payload:
    """A whole completion, or one chunk of a stream."""

    body: dict[str, Any]
    raw: bytes | None = None
    """As the upstream wrote it. None: no upstream wrote this, or not in a way that every client could read."""
    held: Held | None = field(default=None, repr=False, compare=False)
    """Of a large one: the room that it takes, as long as it is here."""

    def named(self, model: str) -> bytes:
        """As JSON, under our name for the model: the upstream's own bytes but for the value of `model`."""
        if self.raw is not None:
            renamed = with_model(self.raw, self.body, model)
            if renamed is not None:
                return renamed
        return dump({**self._exact(), "model": model})

    def without(self, name: str) -> Payload:
        """All but this member."""
        return Payload({each: value for each, value in self._exact().items() if each != name})

    def _exact(self) -> dict[str, Any]:
        return self.body if self.raw is None else exactly(self.raw, self.body)


def parsed(data: bytes, *, checked: bool = False) -> tuple[Any, bytes | None]:
    """JSON, and its bytes where they may be shown as they are: not where they hold NaN, which is no JSON.

    Args:
        checked: it is known to hold no more than MAX_VALUES_AT_ONCE.

    Raises:
        TooMuchJson: it would take too long.
        ValueError: it is not JSON at all, or nested beyond the stack.
    """
    if len(data) > SHALLOW and not checked:
        check_shape(data, MAX_VALUES_AT_ONCE)
    try:
        return orjson.loads(data), data
    except orjson.JSONDecodeError:  # also of half characters and NaN, which models do send
        return loads(data), None


def exact(data: bytes) -> tuple[Any, None]:
    """As `parsed`, every number as it was written, for what is to be written again. Raises ValueError."""
    check_shape(data, MAX_VALUES_AT_ONCE)
    return loads(data), None


async def parsed_in_turns(data: bytes) -> tuple[Any, bytes | None]:
    """As `parsed`, of what holds too much for that: in a thread, by a parser that lets others run meanwhile. The usual
    ones hold the interpreter until they are done, in whichever thread. Raises ValueError."""
    return await asyncio.get_running_loop().run_in_executor(_PARSING, _patiently_parsed, data), data


def _patiently_parsed(data: bytes) -> Any:
    return _PATIENT.decode(data.decode())


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is not a number in JSON")


_PARSING = ThreadPoolExecutor(1, "uniroute-parsing")
_json: Any = json  # these parts of it have no types
_PATIENT: Any = json.JSONDecoder(parse_constant=_refuse_constant)
_PATIENT.parse_object, _PATIENT.parse_array = _json.decoder.JSONObject, _json.decoder.JSONArray
_PATIENT.scan_once = _json.scanner.py_make_scanner(_PATIENT)


def exactly(data: bytes, body: dict[str, Any]) -> dict[str, Any]:
    """What is to be written again. orjson, which made `body` of it, rounds whole numbers beyond 64 bits."""
    try:
        read: dict[str, Any] = loads(data)
    except ValueError:  # nested deeper than this parser follows
        return body
    return read
