from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from router_core.documents import (
    MAX_SET_BYTES,
    DocumentTooLarge,
    Fields,
    JsonObject,
    parse_json,
    read_bounded,
    short_repr,
)
from router_core.errors import InvalidValidationSet
from router_core.validation.graders import parse_grader
from router_core.validation.validation_set import ValidationPrompt, ValidationSet

MAX_PROMPTS = 5_000
MAX_LINE_BYTES = 1_000_000
MAX_ANSWER_TOKENS = 32_768
DEFAULT_MAX_TOKENS = 512

_FIELDS = ("id", "family", "prompt", "messages", "grader", "max_tokens", "level", "language", "reference")
_ROLES = ("system", "developer", "user", "assistant")


def load_validation_set(path: Path) -> ValidationSet:
    """Read a user's validation set from JSONL.

    Raises:
        InvalidValidationSet: at the first line that cannot be used; it names the file, the line, the field and the fix.
    """
    prompts: dict[str, tuple[int, ValidationPrompt]] = {}
    for number, line in _lines(path):
        try:
            prompt = parse_prompt(_parse_object(line), default_id=f"line-{number}")
            if prompt.id in prompts:
                earlier = prompts[prompt.id][0]
                raise InvalidValidationSet(f"field 'id' repeats {prompt.id!r} of line {earlier}: give it another id")
        except InvalidValidationSet as error:
            raise InvalidValidationSet(f"{path}, line {number}: {error}") from None
        prompts[prompt.id] = number, prompt
    if not prompts:
        raise InvalidValidationSet(f"{path}: there is no prompt in it; write one JSON object on each line")
    return ValidationSet.from_prompts(prompt for _, prompt in prompts.values())


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line numbers, from 1, and lines; blank lines and a leading byte order mark are dropped."""
    try:
        content = read_bounded(path, MAX_SET_BYTES)
    except OSError as error:
        raise InvalidValidationSet(f"{path}: cannot be read: {error.strerror}") from None
    except DocumentTooLarge as error:
        raise InvalidValidationSet(f"{path}: {error}") from None
    found = 0
    for number, raw in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not raw.strip():
            continue
        found += 1
        if found > MAX_PROMPTS:
            raise InvalidValidationSet(f"{path}, line {number}: more than {MAX_PROMPTS} prompts; keep the best of them")
        yield number, _decode(path, number, raw)


def _decode(path: Path, number: int, raw: bytes) -> str:
    if len(raw) > MAX_LINE_BYTES:
        raise InvalidValidationSet(f"{path}, line {number}: longer than {MAX_LINE_BYTES} bytes; shorten the prompt")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidValidationSet(
            f"{path}, line {number}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8"
        ) from None


def _parse_object(line: str) -> JsonObject:
    try:
        value = parse_json(line, _without_repeats)
    except json.JSONDecodeError as error:
        raise InvalidValidationSet(
            f"not JSON at column {error.colno}: {error.msg}; write one object per line"
        ) from None
    except InvalidValidationSet:
        raise
    except ValueError as error:
        raise InvalidValidationSet(f"not usable JSON: {error}; write one flat object per line") from None
    if not isinstance(value, dict):
        raise InvalidValidationSet(
            f'must be a JSON object such as {{"prompt": …, "grader": …}}; got {short_repr(value)}'
        )
    return value


def _without_repeats(pairs: list[tuple[str, object]]) -> JsonObject:
    found: JsonObject = {}
    for key, value in pairs:
        if key in found:
            raise InvalidValidationSet(f"field {key!r} is stated twice: keep one")
        found[key] = value
    return found


def parse_prompt(record: Mapping[str, object], *, default_id: str) -> ValidationPrompt:
    """Read one prompt from its JSON object. Raises InvalidValidationSet that names the field."""
    fields = Fields(record, _FIELDS)
    return ValidationPrompt(
        id=fields.text("id", default_id),
        family=fields.text("family", "custom"),
        messages=_messages(fields),
        grader=parse_grader(fields.mapping("grader")),
        max_tokens=fields.whole_number("max_tokens", 1, MAX_ANSWER_TOKENS, DEFAULT_MAX_TOKENS),
        level=fields.whole_number("level", 1, 3) if fields.has("level") else None,
        language=fields.text("language", "en"),
        reference=fields.optional_text("reference"),
    )


def _messages(fields: Fields) -> tuple[Mapping[str, str], ...]:
    if fields.has("prompt") == fields.has("messages"):
        stated = "both" if fields.has("prompt") else "neither"
        raise InvalidValidationSet(f"state either 'prompt' (a string) or 'messages' (a list), not {stated}")
    if fields.has("prompt"):
        return ({"role": "user", "content": fields.text("prompt")},)
    turns = fields.values["messages"]
    if not isinstance(turns, list) or not turns:
        raise fields.error("messages", 'a list such as [{"role": "user", "content": "…"}]')
    messages = tuple(_message(turn, index) for index, turn in enumerate(turns))
    if messages[-1]["role"] != "user":
        raise InvalidValidationSet("field 'messages' must end with a user turn: the model is to answer it")
    return messages


def _message(turn: object, index: int) -> Mapping[str, str]:
    if not isinstance(turn, dict):
        raise InvalidValidationSet(
            f"field 'messages[{index}]' must be an object with role and content; got {short_repr(turn)}"
        )
    fields = Fields(turn, ("role", "content"), f"messages[{index}].")
    if (role := fields.text("role")) not in _ROLES:
        raise fields.error("role", f"one of {', '.join(_ROLES)}")
    return {"role": role, "content": fields.text("content")}
