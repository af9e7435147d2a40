"""OpenTelemetry's names for calls of generative models: attributes and metrics.

Two versions are known. By default names are those of the semantic conventions v1.41.0, the last that were published
with all others. With `gen_ai_latest_experimental` in OTEL_SEMCONV_STABILITY_OPT_IN they are those of
open-telemetry/semantic-conventions-genai v0.1.0, where counters of tokens take the place of a histogram.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from proxy.server.metrics import FastCounter, FastHistogram, Values
from proxy.settings.litellm_params import stated_address
from proxy.settings.redaction import is_reference
from proxy.storage.records import ModelRecord
from proxy.storage.usage import UsageRecord
from proxy.upstream.payload import JSONPayload, NativePayload
from proxy.upstream.pool import DEFAULT_PORTS
from proxy.upstream.provider_resolution import resolve_static

OPT_IN = "OTEL_SEMCONV_STABILITY_OPT_IN"

LATEST = "gen_ai_latest_experimental"

CAPTURE = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"

OTHER = "_OTHER"

# litellm's name of a provider → the convention's. Others are theirs.
_PROVIDERS = {
    "azure": "azure.ai.openai",
    "azure_ai": "azure.ai.inference",
    "bedrock": "aws.bedrock",
    "bedrock_converse": "aws.bedrock",
    "cohere_chat": "cohere",
    "gemini": "gcp.gemini",
    "mistral": "mistral_ai",
    "moonshot": "moonshot_ai",
    "text-completion-openai": "openai",
    "vertex_ai": "gcp.vertex_ai",
    "vertex_ai_beta": "gcp.vertex_ai",
    "watsonx": "ibm.watsonx.ai",
    "xai": "x_ai",
}

# Of any text in an attribute that a client or a model wrote.
MAX_TEXT_CHARS = 256

# Of the messages of a prompt, and of an answer.
MAX_CONTENT_CHARS = 65_536

Attributes = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """Which model an attempt asks, in the convention's words."""

    record: ModelRecord
    provider: str
    model: str
    """The provider's own name for it."""
    address: str = ""
    port: int = 0

    @classmethod
    def of(cls, record: ModelRecord) -> Target:
        resolved = record.resolved or resolve_static(record.litellm_params, record.info.forward)
        stated = str(record.litellm_params["model"])
        provider, model = (
            (stated.partition("/")[0], stated) if resolved is None else (resolved.provider, resolved.model)
        )
        address, port = _host_of(stated_address(record.litellm_params) or (resolved.api_base if resolved else None))
        return cls(record, _PROVIDERS.get(provider, provider) or "openai", model or stated, address, port)

    def attributes(self, operation: str) -> Attributes:
        """Return what a sampler may go by."""
        named = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": self.provider,
            "gen_ai.request.model": self.model,
        }
        return {**named, "server.address": self.address, "server.port": self.port} if self.address else named


def _host_of(url: str | None) -> tuple[str, int]:
    if not url or is_reference(url):
        return "", 0
    try:
        parts = urlsplit(url)
        return (parts.hostname or "", parts.port or DEFAULT_PORTS.get(parts.scheme, 0))
    except ValueError:
        return "", 0


_REQUEST_NUMBERS = (
    ("temperature", "gen_ai.request.temperature", float),
    ("top_p", "gen_ai.request.top_p", float),
    ("top_k", "gen_ai.request.top_k", float),
    ("frequency_penalty", "gen_ai.request.frequency_penalty", float),
    ("presence_penalty", "gen_ai.request.presence_penalty", float),
    ("seed", "gen_ai.request.seed", int),
    ("max_tokens", "gen_ai.request.max_tokens", int),
    ("max_completion_tokens", "gen_ai.request.max_tokens", int),
)

# Of integers in an attribute.
_MAX_INTEGER = 2**63 - 1


def request_attributes(body: Mapping[str, Any], *, stream: bool, latest: bool) -> Attributes:
    """Return what a chat body asks for. What is not of the right type is left out."""
    found: Attributes = {"gen_ai.request.stream": True} if stream else {}
    for name, attribute, kind in _REQUEST_NUMBERS:
        value: Any = body.get(name)
        if type(value) in (int, float) and abs(value) <= _MAX_INTEGER:
            found[attribute] = int(value) if latest and name == "top_k" else kind(value)
    if type(choices := body.get("n")) is int and 1 < choices <= _MAX_INTEGER:
        found["gen_ai.request.choice.count"] = choices
    stop = body.get("stop")
    if stop := [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else None:
        found["gen_ai.request.stop_sequences"] = [text(each) for each in stop[:16] if isinstance(each, str)]
    if isinstance(wanted := body.get("response_format"), Mapping) and "type" in wanted:
        found["gen_ai.output.type"] = "text" if wanted["type"] == "text" else "json"
    if latest and isinstance(effort := body.get("reasoning_effort"), str):
        found["gen_ai.request.reasoning.level"] = text(effort)
    return found


def usage_attributes(entry: UsageRecord, *, latest: bool) -> Attributes:
    """Return the tokens that the model reported."""
    written = "cache_write" if latest else "cache_creation"
    counts = (
        ("input_tokens", entry.prompt_tokens),
        ("output_tokens", entry.output_tokens),
        ("cache_read.input_tokens", entry.cached_tokens),
        (f"{written}.input_tokens", entry.cache_write_tokens),
        ("reasoning.output_tokens", entry.reasoning_tokens),
        ("audio.input_tokens", entry.audio_input_tokens),
        ("audio.output_tokens", entry.audio_output_tokens),
    )
    return {f"gen_ai.usage.{name}": count for name, count in counts if count is not None}


def text(value: str, max_chars: int = MAX_TEXT_CHARS) -> str:
    """Return a text as an attribute may hold it: of bounded length, and without half characters."""
    return value[:max_chars].encode("utf-8", "replace").decode()


class AnswerFacts:
    """Collect what an answer says of itself, from a completion or from its chunks."""

    def __init__(self, *, keeps_text: bool) -> None:
        self._id = self._model = ""
        self._reasons: dict[int, str] = {}
        self._pieces: dict[int, list[str]] = {}
        self._keeps_text = keeps_text
        self._chars = 0

    def observe(self, payload: JSONPayload) -> None:
        body = payload.body
        if not (self._id and self._model):
            self._name(body)
            if isinstance(payload, NativePayload):
                for named in (payload.native, payload.native.get("message"), payload.native.get("response")):
                    if isinstance(named, Mapping):
                        self._name(named)
        choices = body.get("choices")
        for place, choice in enumerate(choices if isinstance(choices, list) else ()):
            if isinstance(choice, Mapping):
                index = choice.get("index")
                self._observe(index if type(index) is int else place, choice)

    def _name(self, body: Mapping[str, Any]) -> None:
        if not self._id and isinstance(found := body.get("id"), str):
            self._id = found
        if not self._model and isinstance(found := body.get("model"), str):
            self._model = found

    def _observe(self, index: int, choice: Mapping[str, Any]) -> None:
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and index < 128:
            self._reasons[index] = reason
        if self._keeps_text and self._chars < MAX_CONTENT_CHARS:
            part = choice.get("delta") or choice.get("message")
            content = part.get("content") if isinstance(part, Mapping) else choice.get("text")
            if isinstance(content, str):
                self._chars += len(content)
                self._pieces.setdefault(index, []).append(content)

    def attributes(self) -> Attributes:
        found: Attributes = {}
        if self._id:
            found["gen_ai.response.id"] = text(self._id)
        if self._model:
            found["gen_ai.response.model"] = text(self._model)
        if self._reasons:
            found["gen_ai.response.finish_reasons"] = [text(self._reasons[each]) for each in sorted(self._reasons)]
        if self._pieces:
            found["gen_ai.output.messages"] = _bounded_json([self._message(each) for each in sorted(self._pieces)])
        return found

    def _message(self, index: int) -> dict[str, Any]:
        parts = [{"type": "text", "content": "".join(self._pieces[index])}]
        return {"role": "assistant", "parts": parts, "finish_reason": self._reasons.get(index, "")}


def input_messages(messages: Sequence[Any]) -> str:
    """Return the messages of a prompt as the convention's JSON. Images and sounds are named, and not repeated."""
    return _bounded_json([_message_of(each) for each in messages if isinstance(each, Mapping)])


def _message_of(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    parts: list[dict[str, Any]] = []
    if message.get("role") == "tool":
        parts.append({"type": "tool_call_response", "id": message.get("tool_call_id"), "result": content})
    elif isinstance(content, str):
        parts.append({"type": "text", "content": content})
    elif isinstance(content, list):
        parts += [_part_of(each) for each in content if isinstance(each, Mapping)]
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        if isinstance(call, Mapping) and isinstance(function := call.get("function"), Mapping):
            named = {"id": call.get("id"), "name": function.get("name"), "arguments": function.get("arguments")}
            parts.append({"type": "tool_call", **named})
    return {"role": message.get("role"), "parts": parts}


def _part_of(part: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(part.get("text"), str):
        return {"type": "text", "content": part["text"]}
    return {"type": str(part.get("type"))}


def _bounded_json(messages: list[dict[str, Any]]) -> str:
    """Encode messages. Of those that are too long together the oldest are left out, and the last is cut."""
    encoded = json.dumps(messages)
    while len(encoded) > MAX_CONTENT_CHARS and len(messages) > 1:
        messages = messages[(len(messages) + 1) // 2 :]
        encoded = json.dumps(messages)
    if len(encoded) <= MAX_CONTENT_CHARS:
        return encoded
    parts = [part for part in messages[0]["parts"] if part.get("type") == "text"][:1]
    cut = [{"type": "text", "content": str(part.get("content"))[: MAX_CONTENT_CHARS // 8]} for part in parts]
    return json.dumps([{**messages[0], "parts": cut}])


_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)

_TOKENS = tuple(4.0**power for power in range(14))

_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)

_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)

# Attributes of every metric. An empty value stands for none.
_COMMON = ("gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model", "gen_ai.response.model")

_OF_CLIENT = (*_COMMON, "server.address", "server.port")

Labels = tuple[str, ...]


@dataclass(frozen=True)
class Instrument:
    """A metric of the convention."""

    series: FastCounter | FastHistogram
    unit: str


class GenAIMetrics:
    """The convention's metrics: of each attempt as of a client's call, of each request as of a server's.

    Labels are of registered models and of the errors that this server tells apart, so that their number is bounded.
    """

    def __init__(self, *, latest: bool) -> None:
        self._values = Values()
        self.instruments: list[Instrument] = []
        self._latest = latest
        operation = "inference" if latest else "operation"
        self._duration = self._histogram(
            f"gen_ai.client.{operation}.duration", "s", _SECONDS, *_OF_CLIENT, "error.type"
        )
        self._first_chunk = self._histogram(
            f"gen_ai.client.{operation}.time_to_first_chunk", "s", _SECONDS, *_OF_CLIENT
        )
        if latest:
            self._embedding = self._histogram(
                "gen_ai.client.embeddings.duration", "s", _SECONDS, *_OF_CLIENT, "error.type"
            )
            self._embedding_tokens = self._histogram(
                "gen_ai.client.embeddings.operation.input_tokens", "{token}", _TOKENS, *_OF_CLIENT
            )
            self._per_operation = {
                name: self._histogram(f"gen_ai.client.inference.operation.{name}", "{token}", _TOKENS, *_OF_CLIENT)
                for name in ("input_tokens", "output_tokens")
            }
            self._usage = {
                name: self._counter(
                    f"gen_ai.client.inference.usage.{name}", "{token}", *_OF_CLIENT, "gen_ai.token.modality"
                )
                for name in (
                    *("input_tokens", "output_tokens"),
                    *("cache_read.input_tokens", "cache_write.input_tokens", "reasoning.output_tokens"),
                )
            }
        else:
            self._tokens = self._histogram(
                "gen_ai.client.token.usage", "{token}", _TOKENS, *_OF_CLIENT, "gen_ai.token.type"
            )
        self._request = self._histogram("gen_ai.server.request.duration", "s", _SECONDS, *_COMMON, "error.type")
        self._first_token = self._histogram("gen_ai.server.time_to_first_token", "s", _FIRST_TOKEN, *_COMMON)
        self._per_token = self._histogram("gen_ai.server.time_per_output_token", "s", _PER_TOKEN, *_COMMON)

    def _histogram(self, name: str, unit: str, bounds: tuple[float, ...], *labels: str) -> FastHistogram:
        series = FastHistogram(name, _DESCRIPTIONS[name], labels, bounds, values=self._values)
        self.instruments.append(Instrument(series, unit))
        return series

    def _counter(self, name: str, unit: str, *labels: str) -> FastCounter:
        series = FastCounter(name, _DESCRIPTIONS[name], labels, values=self._values)
        self.instruments.append(Instrument(series, unit))
        return series

    def count_attempt(
        self, target: Target, operation: str, entry: UsageRecord, seconds: float, first_s: float | None, error: str
    ) -> None:
        """Count one call of a model.

        Args:
            first_s: from the call to the first content of a stream; None: it was none, or there was no content.
            error: empty if the model answered.
        """
        labels = (
            *(operation, target.provider, target.model, target.record.name),
            *(target.address, str(target.port or "")),
        )
        embeds = self._latest and operation == "embeddings"
        (self._embedding if embeds else self._duration).observe(seconds, (*labels, error))
        if first_s is not None:
            self._first_chunk.observe(first_s, labels)
        if embeds:
            if not error and entry.prompt_tokens is not None:
                self._embedding_tokens.observe(entry.prompt_tokens, labels)
        elif self._latest:
            self._count_usage(labels, entry, failed=bool(error))
        else:
            for kind, count in (("input", entry.prompt_tokens), ("output", entry.output_tokens)):
                if count is not None:
                    self._tokens.observe(count, (*labels, kind))

    def _count_usage(self, labels: Labels, entry: UsageRecord, *, failed: bool) -> None:
        for name, count, audio in (
            ("input_tokens", entry.prompt_tokens, entry.audio_input_tokens),
            ("output_tokens", entry.output_tokens, entry.audio_output_tokens),
            ("cache_read.input_tokens", entry.cached_tokens, None),
            ("cache_write.input_tokens", entry.cache_write_tokens, None),
            ("reasoning.output_tokens", entry.reasoning_tokens, None),
        ):
            if audio:
                self._usage[name].add((*labels, "audio"), audio)
            self._usage[name].add((*labels, "unknown"), max(0, (count or 0) - (audio or 0)))
            if not failed and count is not None and name in self._per_operation:
                self._per_operation[name].observe(count, labels)

    def count_request(self, target: Target, operation: str, requested: str, entry: UsageRecord, error: str) -> None:
        """Count one request of a client."""
        labels = (operation, target.provider, requested, target.record.name)
        self._request.observe(entry.seconds, (*labels, error))
        if error or entry.first_token_s is None:
            return
        self._first_token.observe(entry.first_token_s, labels)
        if entry.output_tokens is not None and entry.output_tokens > 1:
            rest_s = max(0.0, entry.seconds - entry.first_token_s)
            self._per_token.observe(rest_s / (entry.output_tokens - 1), labels)


_DESCRIPTIONS = {
    "gen_ai.client.operation.duration": "GenAI operation duration.",
    "gen_ai.client.inference.duration": "GenAI client inference operation duration.",
    "gen_ai.client.embeddings.duration": "GenAI client embeddings operation duration.",
    "gen_ai.client.operation.time_to_first_chunk": "Time to receive the first chunk.",
    "gen_ai.client.inference.time_to_first_chunk": "Time to receive the first chunk.",
    "gen_ai.client.token.usage": "Number of input and output tokens used.",
    "gen_ai.client.embeddings.operation.input_tokens": "The number of input tokens used per embeddings operation.",
    "gen_ai.client.inference.operation.input_tokens": "The number of input tokens used per inference operation.",
    "gen_ai.client.inference.operation.output_tokens": "The number of output tokens used per inference operation.",
    "gen_ai.client.inference.usage.input_tokens": "The number of input tokens used, including cached tokens.",
    "gen_ai.client.inference.usage.output_tokens": "The number of output tokens used, including reasoning tokens.",
    "gen_ai.client.inference.usage.cache_read.input_tokens": "The number of input tokens served from a cache.",
    "gen_ai.client.inference.usage.cache_write.input_tokens": "The number of input tokens written to a cache.",
    "gen_ai.client.inference.usage.reasoning.output_tokens": "The number of output tokens used for reasoning.",
    "gen_ai.server.request.duration": "Generative AI server request duration.",
    "gen_ai.server.time_to_first_token": "Time to generate first token for successful responses.",
    "gen_ai.server.time_per_output_token": "Time per output token generated after the first token.",
}
