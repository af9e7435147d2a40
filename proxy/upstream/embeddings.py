from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from proxy.errors import UpstreamError
from proxy.json_text import encode_json
from proxy.upstream.errors import find_error, not_a_completion
from proxy.upstream.payload import JSONPayload, parse, replace_model
from proxy.upstream.response_memory import JSONBody, ResponseBounds

EncodingFormat = Literal["float", "base64"]

# Numbers of one response, all vectors together: these are parsed in a few hundredths of a second.
MAX_VECTOR_VALUES = 1_000_000

# As OpenAI writes vectors in base64: 32-bit floats, the lowest byte first.
_FLOATS = np.dtype("<f4")


@dataclass(frozen=True, slots=True)
class EmbeddingsRequest:
    """What one model is asked to turn into vectors."""

    body: Mapping[str, Any]
    raw: bytes | None
    """The bytes that `body` was parsed from, if all of it is for the upstream."""
    encoding: EncodingFormat
    """How the vectors of the answer are written, whatever the upstream makes of the request for it."""


class EmbeddingsReader(JSONBody):
    """Turn the bytes of a response into embeddings."""

    def __init__(self, model: str, bounds: ResponseBounds, headers: Mapping[str, str]) -> None:
        super().__init__(bounds)
        self._model = model
        self._headers = headers

    def embeddings(self, encoding: EncodingFormat) -> JSONPayload:
        """Return the embeddings, once all of the body has come. Raises UpstreamError."""
        data = self.take()
        try:
            value, raw = parse(data, checked=True)
        except ValueError:
            raise not_embeddings(self._model, data, self._headers) from None
        check_embeddings(self._model, value, self._headers)
        payload = with_encoding(self._model, JSONPayload(value, raw), encoding)
        payload.held = self.bounds.held
        return payload


def check_embeddings(model: str, value: Any, headers: Mapping[str, str] | None = None) -> None:
    """Raise UpstreamError if a parsed body is an error, or has no vectors."""
    listed = value.get("data") if isinstance(value, dict) else None
    if find_error(value) is not None or not isinstance(listed, list) or not listed:
        raise not_embeddings(model, value, headers)
    if not all(isinstance(each, dict) and isinstance(each.get("embedding"), list | str) for each in listed):
        raise not_embeddings(model, value, headers)


def not_embeddings(model: str, body: Any, headers: Mapping[str, str] | None = None) -> UpstreamError:
    return not_a_completion(model, body, headers, what="embeddings")


def with_encoding(model: str, payload: JSONPayload, encoding: EncodingFormat) -> JSONPayload:
    """Return embeddings with their vectors in this encoding; many servers know but one. Raises UpstreamError."""
    wanted = str if encoding == "base64" else list
    if all(isinstance(each["embedding"], wanted) for each in payload.body["data"]):
        return payload
    try:
        data = [{**each, "embedding": _encoded(each["embedding"], encoding)} for each in payload.body["data"]]
    except (ValueError, TypeError, OverflowError) as error:
        raise UpstreamError(f"{model} answered with vectors that cannot be read", status=502) from error
    return JSONPayload({**payload.body, "data": data})


def _encoded(vector: list[Any] | str, encoding: EncodingFormat) -> list[float] | str:
    """Write a vector in an encoding. Raises ValueError, TypeError or OverflowError if it is none."""
    if encoding == "base64":
        return vector if isinstance(vector, str) else base64.b64encode(np.array(vector, _FLOATS).tobytes()).decode()
    if isinstance(vector, list):
        return vector
    try:
        numbers: list[float] = np.frombuffer(base64.b64decode(vector, validate=True), _FLOATS).tolist()
    except binascii.Error as error:
        raise ValueError("no base64") from error
    return numbers


def renamed(payload: JSONPayload, model: str) -> bytes:
    """Encode embeddings under our name of the model: the upstream's own bytes, but for the value of `model`.

    `JSONPayload.with_model` would search all vectors for that member.
    """
    raw, body = payload.raw, {**payload.body, "model": model}
    if raw is None:
        return encode_json(body)
    start, end = raw.find(b"["), raw.rfind(b"]") + 1
    outside = replace_model(raw[:start] + b"[]" + raw[end:], {**payload.body, "data": []}, model)
    if outside is None:
        return encode_json(body)
    place = outside.index(b"[]")  # the first bracket still: a name of ours has none
    return outside[:place] + raw[start:end] + outside[place + 2 :]
