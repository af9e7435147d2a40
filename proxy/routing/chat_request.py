from __future__ import annotations

import codecs
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from proxy.errors import BadRequest
from proxy.routing.agents import find_housekeeping
from proxy.routing.json_body import parse_fast, parse_strict
from proxy.routing.requirements import ContentSummary
from proxy.routing.token_limits import check_token_limits
from proxy.settings.litellm_params import reject_control_fields
from proxy.settings.model_config import MAX_AMOUNT, MIN_SECONDS
from proxy.settings.schema import NO_OVERRIDES, TimeoutOverrides
from proxy.storage.client_keys import MAX_TAG_CHARS, MAX_TAGS, TAG_RULE, is_tag
from router_core.text import closest_name
from router_core.types import frozen

# Fields of UniRoute and of OpenRouter: they mean something here and nothing to an upstream.
OWN_FIELDS = frozenset({"uniroute", "models", "route", "provider"})


@frozen
class ChatRequest:
    """A chat request that was parsed and checked."""

    body: Mapping[str, Any]
    """What goes upstream: the caller's JSON object without UniRoute's own fields. `model` is replaced on the way."""
    model: str
    stream: bool
    include_usage: bool
    """The caller asked for the usage chunk of a stream."""
    options: RoutingOptions
    raw: bytes | None = field(default=None, repr=False)
    """What `body` was parsed from, byte for byte; None if that held more than goes upstream."""
    contents: ContentSummary | None = field(default=None, repr=False)
    """What the parser has counted of `body`. None: it has not."""
    translated: bool = False
    """The client speaks another API: its token limit is a cap, and what a model may lack is left out for it."""
    housekeeping: str | None = None
    """What the client asks for itself, as `HousekeepingRequest.task` names it; None: it asks for its user."""


def parse_chat(raw: bytes, headers: Sequence[tuple[str, str]]) -> ChatRequest:
    """Parse and check the body of a chat request.

    Args:
        headers: those of READ_HEADERS that were sent, names in lower case, repeated ones repeated.

    Raises:
        BadRequest: naming the field.
        FieldNotAllowed: the body tries to steer the provider layer.
    """
    fast = parse_fast(raw)
    body = parse_strict(raw) if fast is None else fast.document
    reject_control_fields(body)
    contents = None if fast is None else fast.contents
    return read_chat(body, headers, raw=raw.removeprefix(codecs.BOM_UTF8), contents=contents)


def read_chat(
    body: dict[str, Any],
    headers: Sequence[tuple[str, str]],
    *,
    raw: bytes | None = None,
    contents: ContentSummary | None = None,
    translated: bool = False,
) -> ChatRequest:
    """Check a chat body that was parsed from `raw`, or translated from another API.

    Raises:
        BadRequest: naming the field.
    """
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequest('`model` must be the name of a model, or "auto" to have one chosen', param="model")
    check_token_limits(body)
    if not isinstance(body.get("messages"), list) or not body["messages"]:
        raise BadRequest("`messages` must be a list with at least one message", param="messages")
    if set(map(type, body["messages"])) != {dict}:
        raise BadRequest("every item of `messages` must be an object with `role` and `content`", param="messages")
    has_own_fields = not OWN_FIELDS.isdisjoint(body)
    found = find_housekeeping(body)
    return ChatRequest(
        body=without_own_fields(body) if has_own_fields else body,
        model=model,
        stream=_flag(body, "stream"),
        include_usage=_asks_for_usage(body),
        options=read_options(body, headers),
        raw=None if has_own_fields else raw,
        contents=contents,
        translated=translated,
        housekeeping=None if found is None else found.task,
    )


def without_own_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in OWN_FIELDS}


def parse_object(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object as strictly as `parse_strict`, and faster if nothing is wrong with it."""
    fast = parse_fast(raw)
    return parse_strict(raw) if fast is None else fast.document


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"`{name}` must be true or false; got {value!r}"[:200], param=name)
    return bool(value)


def _asks_for_usage(body: Mapping[str, Any]) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise BadRequest("`stream_options` must be an object", param="stream_options")
    if not isinstance(options.get("include_usage"), bool | None):
        name = "stream_options.include_usage"
        raise BadRequest(f"`{name}` must be true or false", param=name)
    return options.get("include_usage") is True


MAX_ID = 255

SESSION_HEADERS = ("x-session-id", "x-litellm-session-id", "x-claude-code-session-id")

# Headers that tell one agent of a session from another. Claude Code's main agent sends none, Codex's its own thread.
AGENT_HEADERS = ("x-claude-code-agent-id", "thread-id", "x-codex-parent-thread-id", "x-openai-subagent")


def session_id_from_client(body: Mapping[str, Any], headers: Sequence[tuple[str, str]]) -> str | None:
    """Return the session id that a client sends for another gateway, if it is one here too.

    That is the first text of 1 to MAX_ID characters. Other values were not meant for this server, and are ignored.
    """
    return next((found for found in _session_ids(body, headers) if is_session_id(found)), None)


def is_session_id(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_ID


def _session_ids(body: Mapping[str, Any], headers: Sequence[tuple[str, str]]) -> Iterator[Any]:
    for known in SESSION_HEADERS:
        values = [value.strip(" \t") for name, value in headers if name == known]
        if len(values) == 1:
            yield values[0]
    yield body.get("prompt_cache_key")
    metadata = body.get("metadata")
    if isinstance(metadata, Mapping):
        yield metadata.get("session_id")


def _agent(headers: Sequence[tuple[str, str]]) -> str | None:
    """Return which agent of a session asks; None: its main one, or the client does not say."""
    stated = [(name, value.strip(" \t")) for name, value in headers if name in _AGENTS]
    return "\n".join(f"{name}={value}" for name, value in stated if is_session_id(value)) or None


_AGENTS = frozenset(AGENT_HEADERS)

PER_MILLION = 1e6

_CAPS = ("prompt", "completion")

# OpenRouter's other caps: nothing is billed by them here, so none can be exceeded.
_IGNORED_CAPS = ("request", "image", "audio")

_PRICE = re.compile(r"([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)

MAX_ECHO = 60


@dataclass(frozen=True)
class ProviderPreferences:
    """What a request states in OpenRouter's `provider`. None: not stated."""

    only: tuple[str, ...] | None = None
    """Names of models that are the only candidates."""
    ignore: tuple[str, ...] = ()
    """Names of models that are no candidates."""
    max_input_cost_per_token: float | None = None
    """In USD. Models whose price is above it are ruled out."""
    max_output_cost_per_token: float | None = None
    allow_fallbacks: bool | None = None


NO_PREFERENCES = ProviderPreferences()


def read_provider(body: Mapping[str, Any]) -> ProviderPreferences:
    """Read `provider`. Raises BadRequest naming the field."""
    stated = body.get("provider")
    if stated is None:
        return NO_PREFERENCES
    if not isinstance(stated, dict):
        raise BadRequest("`provider` must be an object", param="provider")
    prompt, completion = _max_price(stated.get("max_price"))
    return ProviderPreferences(
        only=_names(stated, "only"),
        ignore=_names(stated, "ignore") or (),
        max_input_cost_per_token=prompt,
        max_output_cost_per_token=completion,
        allow_fallbacks=_optional_flag(stated, "allow_fallbacks"),
    )


def _names(stated: Mapping[str, Any], field: str) -> tuple[str, ...] | None:
    value = stated.get(field)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise BadRequest(f"`provider.{field}` must be a list of model names", param=f"provider.{field}")
    return tuple(dict.fromkeys(value))


def _optional_flag(stated: Mapping[str, Any], field: str) -> bool | None:
    value = stated.get(field)
    if not isinstance(value, bool | None):
        raise BadRequest(f"`provider.{field}` must be true or false", param=f"provider.{field}")
    return value


def _max_price(stated: Any) -> tuple[float | None, float | None]:
    if stated is None:
        return None, None
    if not isinstance(stated, dict):
        raise BadRequest(
            "`provider.max_price` must be an object: {prompt, completion} in USD per million tokens",
            param="provider.max_price",
        )
    for name in stated:
        if name not in _CAPS + _IGNORED_CAPS:  # a cap that is misspelt would be a cap that is not kept
            raise BadRequest(
                f"`provider.max_price.{name[:MAX_ECHO]}` is not a price; known are {', '.join(_CAPS)}",
                param="provider.max_price",
            )
    prompt, completion = (_per_token(stated.get(name), f"provider.max_price.{name}") for name in _CAPS)
    return prompt, completion


def _per_token(value: Any, param: str) -> float | None:
    """Convert USD per million tokens, a number or its text, to USD per token."""
    if value is None:
        return None
    number = _number(value)
    if not (math.isfinite(number) and number >= 0):
        shown = repr(value)[:MAX_ECHO]
        raise BadRequest(
            f"`{param}` must be USD per million tokens, a finite number, 0 or more; got {shown}", param=param
        )
    return number / PER_MILLION


def _number(value: Any) -> float:
    """Return a number or its text as a float; NaN if it is neither."""
    if isinstance(value, str):
        return float(value) if len(value) <= MAX_ECHO and _PRICE.fullmatch(value) else math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


LAMBDA_HEADERS = ("lambda", "x-uniroute-lambda")

TAGS_HEADER, METADATA_HEADER = "x-uniroute-tags", "x-uniroute-metadata"

ALLOWED_KEYS = (
    *("lambda", "models", "max_cost_usd", "latency_weight", "session", "fallbacks", "timeouts"),
    *("tags", "metadata"),
)

TIMEOUTS = tuple(column.name for column in fields(TimeoutOverrides))

_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


@frozen
class RoutingOptions:
    """What a request states of its routing. None: not stated, the settings decide."""

    lambda_: float | None = None
    models: tuple[str, ...] | None = None
    """The only candidates."""
    max_cost_usd: float | None = None
    latency_weight: float | None = None
    session: str | None = field(default=None, repr=False)
    """Of `uniroute.session`, or else of the client's own headers and fields."""
    agent: str | None = field(default=None, repr=False)
    """Which agent of the session asks, where the client's headers say so: each has a conversation of its own."""
    fallbacks: bool | None = None
    timeouts: TimeoutOverrides = NO_OVERRIDES
    provider: ProviderPreferences = NO_PREFERENCES
    tags: tuple[str, ...] = ()
    """Noted in the records of the request."""
    metadata: bool = False
    """Whether the answer is to say how it came about."""


NO_OPTIONS = RoutingOptions()

# The headers that are read here.
READ_HEADERS = (*LAMBDA_HEADERS, *SESSION_HEADERS, *AGENT_HEADERS, TAGS_HEADER, METADATA_HEADER)

_READ_FIELDS = frozenset({"uniroute", "models", "provider", "prompt_cache_key", "metadata"})


def read_options(body: Mapping[str, Any], headers: Sequence[tuple[str, str]]) -> RoutingOptions:
    """Read the routing options of a body and its headers; the body wins. Raises BadRequest naming the field."""
    if not headers and _READ_FIELDS.isdisjoint(body):
        return NO_OPTIONS
    stated = body.get("uniroute", {})
    if not isinstance(stated, dict):
        raise BadRequest("`uniroute` must be an object", param="uniroute")
    for name in stated:
        if name not in ALLOWED_KEYS:
            raise BadRequest(f"`uniroute.{name[:MAX_ECHO]}` is not an option{_nearest(name)}", param="uniroute")
    from_header = _header_lambda(headers)
    own = _amount(stated, "lambda")
    provider = read_provider(body)
    return RoutingOptions(
        lambda_=from_header if own is None else own,
        models=_models(body, stated),
        max_cost_usd=_amount(stated, "max_cost_usd"),
        latency_weight=_amount(stated, "latency_weight"),
        session=_session(stated) or session_id_from_client(body, headers),
        agent=_agent(headers),
        fallbacks=_fallbacks(stated, provider),
        provider=provider,
        timeouts=_timeouts(stated),
        tags=_tags(body, stated, headers),
        metadata=_metadata(stated, headers),
    )


def _tags(body: Mapping[str, Any], stated: Mapping[str, Any], headers: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Return the tags of `uniroute.tags`, of the header, and of the client's own `metadata.tags`.

    What stands in `metadata` was meant for the provider: of it, what is no tag here is ignored.
    """
    listed = stated.get("tags")
    own: list[Any] = [] if listed is None else listed
    if not isinstance(own, list) or not all(map(is_tag, own)) or len(own) > MAX_TAGS:
        raise BadRequest(f"`uniroute.tags` must be a list of {TAG_RULE}", param="uniroute.tags")
    in_headers = [
        text for name, value in headers if name == TAGS_HEADER for tag in value.split(",") if (text := tag.strip(" \t"))
    ]
    if not all(map(is_tag, in_headers)) or len(in_headers) > MAX_TAGS:
        raise BadRequest(f"the header `{TAGS_HEADER}` must be a list with commas of {TAG_RULE}", param=TAGS_HEADER)
    return tuple(dict.fromkeys((*own, *in_headers, *_metadata_tags(body.get("metadata")))))[:MAX_TAGS]


def _metadata_tags(metadata: object) -> Iterator[str]:
    tags = metadata.get("tags") if isinstance(metadata, Mapping) else None
    if isinstance(tags, str):
        tags = [tag.strip() for tag in tags[: MAX_TAGS * (MAX_TAG_CHARS + 2)].split(",")]
    if isinstance(tags, list):
        yield from filter(is_tag, tags[:MAX_TAGS])


def _metadata(stated: Mapping[str, Any], headers: Sequence[tuple[str, str]]) -> bool:
    own = stated.get("metadata")
    if not isinstance(own, bool | None):
        raise BadRequest("`uniroute.metadata` must be true or false", param="uniroute.metadata")
    if own is not None:
        return own
    return any(name == METADATA_HEADER and value.strip(" \t") in ("1", "true") for name, value in headers)


def _nearest(name: str, known: Sequence[str] = ALLOWED_KEYS) -> str:
    closest = closest_name(name, known)
    return f"; did you mean `{closest}`?" if closest else f"; known are {', '.join(known)}"


def _header_lambda(headers: Sequence[tuple[str, str]]) -> float | None:
    values = [(name, value) for name, value in headers if name in LAMBDA_HEADERS]
    if not values:
        return None
    name, text = values[0]
    if len(values) > 1:
        raise BadRequest("the header `lambda` is given more than once", param=name)
    if not _NUMBER.fullmatch(text.strip(" \t")):
        raise BadRequest(_not_an_amount(f"the header `{name}`", text), param=name)
    return _checked(float(text), f"the header `{name}`", name, text)


def _amount(stated: Mapping[str, Any], name: str, path: str = "uniroute") -> float | None:
    value = stated.get(name)
    return None if value is None else amount(value, f"{path}.{name}")


def amount(value: Any, param: str) -> float:
    """Return a number as requests may state it. Raises BadRequest naming `param`."""
    label = f"`{param}`"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRequest(_not_an_amount(label, value), param=param)
    try:
        return _checked(float(value), label, param, value)
    except OverflowError:
        raise BadRequest(_not_an_amount(label, "a number of too many digits"), param=param) from None


def _checked(number: float, label: str, param: str, shown: object) -> float:
    if not 0 <= number <= MAX_AMOUNT:  # also of NaN
        raise BadRequest(_not_an_amount(label, shown), param=param)
    return number + 0.0  # -0.0 becomes 0.0


def _not_an_amount(label: str, shown: object) -> str:
    return f"{label} must be a finite number from 0 to {MAX_AMOUNT:g}; got {str(shown)[:MAX_ECHO]!r}"


def _models(body: Mapping[str, Any], stated: Mapping[str, Any]) -> tuple[str, ...] | None:
    param, value = ("uniroute.models", stated["models"]) if "models" in stated else ("models", body.get("models"))
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(isinstance(name, str) and name for name in value):
        raise BadRequest(f"`{param}` must be a list of model names with at least one", param=param)
    return tuple(dict.fromkeys(value))


def _session(stated: Mapping[str, Any]) -> str | None:
    value = stated.get("session")
    if value is None:
        return None
    if not isinstance(value, str) or not is_session_id(value):
        message = f"`uniroute.session` must be a text of 1 to {MAX_ID} characters"
        raise BadRequest(message, param="uniroute.session")
    return value


def _fallbacks(stated: Mapping[str, Any], provider: ProviderPreferences) -> bool | None:
    own = stated.get("fallbacks")
    if not isinstance(own, bool | None):
        raise BadRequest("`uniroute.fallbacks` must be true or false", param="uniroute.fallbacks")
    return provider.allow_fallbacks if own is None else own


def _timeouts(stated: Mapping[str, Any]) -> TimeoutOverrides:
    path, value = "uniroute.timeouts", stated.get("timeouts")
    if value is None:
        return NO_OVERRIDES
    if not isinstance(value, dict):
        raise BadRequest(f"`{path}` must be an object of seconds", param=path)
    for name in value:
        if name not in TIMEOUTS:
            raise BadRequest(f"`{path}.{name[:MAX_ECHO]}` is not known{_nearest(name, TIMEOUTS)}", param=path)
    seconds = {name: _amount(value, name, path) for name in TIMEOUTS}
    for name, amount in seconds.items():
        if amount is not None and amount < MIN_SECONDS:
            raise BadRequest(
                f"`{path}.{name}` must be {MIN_SECONDS:g} seconds or more; got {amount:g}", param=f"{path}.{name}"
            )
    return TimeoutOverrides(**seconds)
