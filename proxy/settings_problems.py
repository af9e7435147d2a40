"""What pydantic says of a wrong setting, in one line for people. Reads and checks nothing itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from pydantic import ValidationError

from proxy.settings_sources import unknown

_SECRET = frozenset({"admin_key", "redis_url", "redis_password", "redis_sentinel_password", "price_url"})
_WORDS = {
    "model_type": "must be a mapping of keys to values",
    "dataclass_type": "must be a mapping of keys to values",
    "dict_type": "must be a mapping of keys to values",
    "tuple_type": "must be a list",
    "string_type": "must be text",
    "missing": "is missing",
}


def first_problem(error: ValidationError, config: Path | None, nested: Mapping[str, Collection[str]]) -> str:
    """One line: where, which key, what was wrong, with the value unless it may be a secret.

    Args:
        nested: the keys of the settings that are mappings themselves.
    """
    problem = min(error.errors(include_url=False), key=lambda found: found["type"] not in _MISWRITTEN)
    source = f"{config}: " if config else ""
    if problem["type"] in _MISWRITTEN:
        where = ".".join(map(str, problem["loc"][:-1]))
        return str(unknown(f"{source}{where}", problem["loc"][-1], nested[str(problem["loc"][0])]))
    keys = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]]
    path = "".join(keys).removeprefix(".")
    stated = problem["msg"].removeprefix("Value error, ")
    message = _WORDS.get(problem["type"], stated[:1].lower() + stated[1:])
    return f"{source}{path}{': ' if path else ''}{message}{_got(problem['input'], message, problem['loc'])}"


_MISWRITTEN = ("extra_forbidden", "unexpected_keyword_argument")
"""A key that is not known; told first, for it is often the reason why another one is missing."""


def _got(value: object, message: str, where: Collection[int | str]) -> str:
    if not isinstance(value, (str, int, float, bool)) or _SECRET.intersection(map(str, where)):
        return ""
    return "" if "got " in message or repr(value) in message else f"; got {value!r}"
