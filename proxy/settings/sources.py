from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from proxy.settings.litellm_params import IGNORED_PARAMS, IGNORED_SECTIONS, is_model_info_of_litellm, unknown_fields
from proxy.settings.model_config import TIERED, SettingsError
from router_core.documents import MAX_CONFIG_BYTES, MAX_DEPTH, MAX_NODES, DocumentTooLarge, read_bounded
from router_core.text import closest_name
from router_core.types import price_field

log = logging.getLogger("uniroute.settings")

PREFIX = "UNIROUTE_"

# Variables that are not settings: where the configuration is, and what the command line talks to and with.
OTHER_VARIABLES = frozenset({"CONFIG", "URL", "API_KEY"})

_SET_BY_KUBERNETES = re.compile(r"SERVICE_\w+|PORT_\d+_\w+")


def unknown_key_error(where: str, key: object, known: Collection[str]) -> SettingsError:
    closest = closest_name(str(key), known, min_similarity=0.5)
    hint = f"did you mean {closest!r}?" if closest else f"known keys: {', '.join(sorted(known))}"
    return SettingsError(f"{where}: unknown key {str(key)!r}; {hint}")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file as one mapping; an empty file is an empty mapping. Raises SettingsError."""
    try:
        loaded = _parse_yaml(read_bounded(path, MAX_CONFIG_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise SettingsError(
            f"{path}: cannot be read ({error.strerror}); give a file with --config or UNIROUTE_CONFIG"
        ) from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: is not valid YAML: {_yaml_problem(error)}") from None
    except DocumentTooLarge as error:
        raise SettingsError(f"{path}: {error}") from None
    except _YAML_VALUE_ERRORS as error:
        raise SettingsError(f"{path}: is not valid YAML: a value cannot be read ({error})"[:400]) from None
    return _mapping(loaded, str(path))


def _parse_yaml(text: str) -> object:
    """Raises yaml.YAMLError, DocumentTooLarge, and any of _YAML_VALUE_ERRORS."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Count the nodes and levels of a document with each alias written out.

    An alias refers to something above it, which is measured already, or to something around it, which has no end.

    Raises:
        DocumentTooLarge: it has too many, or an anchor holds an alias of itself.
    """
    if id(node) in known:
        measured = known[id(node)]
        if measured is None:
            raise DocumentTooLarge(f"line {node.start_mark.line + 1}: an anchor holds an alias of itself")
        return measured
    known[id(node)] = None
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    size, depth = 1, 1
    for part in parts:
        inner, levels = _measure(part, known)
        size, depth = size + inner, max(depth, 1 + levels)
    if size > MAX_NODES:
        raise DocumentTooLarge(f"holds more than {MAX_NODES:,} values, each alias counted as what it stands for")
    if depth > MAX_DEPTH:
        raise DocumentTooLarge(f"is nested deeper than {MAX_DEPTH} levels")
    known[id(node)] = size, depth
    return size, depth


def _yaml_problem(error: yaml.YAMLError) -> str:
    """Return what is wrong and where, without the parser's excerpt of the file."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


# What YAML's types raise over impossible dates, numbers of 5,000 digits and the like.
_YAML_VALUE_ERRORS = (ValueError, TypeError, LookupError, AttributeError, OverflowError)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader that refuses a key written twice, of which the plain one silently keeps the last."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Raises DocumentTooLarge before the stack is too deep."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise DocumentTooLarge(f"is nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def file_values(path: Path, fields: Collection[str], info_fields: Collection[str]) -> dict[str, Any]:
    """Read a configuration file: the settings of its `uniroute` section, and `model_list`. Raises SettingsError."""
    document = read_yaml(path)
    for section in document:
        if section in IGNORED_SECTIONS:
            log.warning("%s: section %r is LiteLLM's and has no meaning here; it is ignored", path, section)
        elif section not in ("model_list", "uniroute"):
            raise unknown_key_error(str(path), section, {"model_list", "uniroute"})
    values = dict(_mapping(document.get("uniroute"), f"{path}: uniroute"))
    for key in values:
        if key not in fields or key == "model_list":
            raise unknown_key_error(f"{path}: uniroute", key, set(fields) - {"model_list"})
    entries = document.get("model_list") or []
    if not isinstance(entries, list):
        raise SettingsError(f"{path}: model_list must be a list of models; got {_kind(entries)}")
    values["model_list"] = [
        _model_config(entry, f"{path}: model_list[{i}]", info_fields) for i, entry in enumerate(entries)
    ]
    return values


def _model_config(raw: object, where: str, info_fields: Collection[str]) -> dict[str, Any]:
    """Drop LiteLLM's own keys from a model, and move prices and `max_parallel_requests` to `model_info`."""
    entry = dict(_mapping(raw, where))
    for key in entry:
        if key not in ("model_name", "litellm_params", "model_info"):
            raise unknown_key_error(where, key, {"model_name", "litellm_params", "model_info"})
    params = dict(_mapping(entry.get("litellm_params"), f"{where}.litellm_params"))
    info = dict(_mapping(entry.get("model_info"), f"{where}.model_info"))
    for key in [key for key in params if _is_price(key) or key == "max_parallel_requests"]:
        info.setdefault(key, params.pop(key))
    for key in sorted(name for name in params if name in IGNORED_PARAMS or is_model_info_of_litellm(str(name))):
        log.warning("%s.litellm_params: %r is LiteLLM's and has no meaning here; it is ignored", where, key)
        del params[key]
    for key in unknown_fields(params):
        log.warning("%s.litellm_params: %r is not known here; it is sent in the body of every request", where, key)
    for key in [key for key in info if key not in info_fields and not _is_price(key)]:
        if not is_model_info_of_litellm(key):
            raise unknown_key_error(f"{where}.model_info", key, info_fields)
        log.warning("%s.model_info: %r is LiteLLM's and has no meaning here; it is ignored", where, key)
        del info[key]
    return {**entry, "litellm_params": params, "model_info": info}


def _is_price(key: object) -> bool:
    """Return whether this is a price, which LiteLLM reads in `litellm_params` as well as in `model_info`."""
    return isinstance(key, str) and (key == TIERED or price_field(key) is not None)


def environment_values(
    environ: Mapping[str, str], paths: Mapping[str, tuple[str, ...]]
) -> dict[tuple[str, ...], tuple[str, str]]:
    """Return the variable and the value of each setting that is stated as UNIROUTE_<NAME>.

    Args:
        paths: the setting of each variable: ("profile", "prompts") of PROFILE_PROMPTS.

    Raises:
        SettingsError: a variable is a slip of a known one.
    """
    values: dict[tuple[str, ...], tuple[str, str]] = {}
    for variable in sorted(environ):
        name = variable.removeprefix(PREFIX)
        if name == variable or name in OTHER_VARIABLES or _set_by_kubernetes(name, environ[variable]):
            continue
        if name in paths:
            values[paths[name]] = (variable, environ[variable])
        else:
            _report_unknown_variable(variable, name, paths)
    return values


def _set_by_kubernetes(name: str, value: str) -> bool:
    # A Kubernetes service called `uniroute` puts UNIROUTE_PORT=tcp://10.0.0.7:8000 and more into every pod.
    return _SET_BY_KUBERNETES.fullmatch(name) is not None or (name == "PORT" and value.startswith("tcp://"))


def _report_unknown_variable(variable: str, name: str, known: Collection[str]) -> None:
    closest = closest_name(name, [*known, *OTHER_VARIABLES], min_similarity=0.8)
    if closest:
        raise SettingsError(f"environment: unknown variable {variable}; did you mean {PREFIX}{closest}?")
    log.warning("environment: %s is not a setting; it is ignored", variable)


def _mapping(value: object, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SettingsError(f"{where} must be a mapping of keys to values; got {_kind(value)}")
    return value


def _kind(value: object) -> str:
    """Name the type of a misplaced value. The value itself is not repeated: it may hold a key."""
    names = {"list": "a list", "dict": "a mapping", "str": "a text"}
    return names.get(type(value).__name__, f"a {type(value).__name__}")


_SECRET_SETTINGS = frozenset({"admin_key", "redis_url", "redis_password", "redis_sentinel_password", "price_url"})

# Our messages for pydantic's types of errors, where its own are hard to read.
_MESSAGES = {
    "model_type": "must be a mapping of keys to values",
    "dataclass_type": "must be a mapping of keys to values",
    "dict_type": "must be a mapping of keys to values",
    "tuple_type": "must be a list",
    "string_type": "must be text",
    "missing": "is missing",
}


@dataclass(frozen=True)
class Origins:
    """Where the settings were stated, so that an error can name the place and not only the setting."""

    config: Path | None = None
    in_file: frozenset[str] = frozenset()
    """The settings that the file states, by their first key."""
    elsewhere: Mapping[tuple[str, ...], str] = field(default_factory=dict)
    """The variable or the option of each setting that is not stated in the file."""

    def name(self, setting: str) -> str:
        """Return where `profile.prompts` was stated, or its own name if it was not."""
        keys = tuple(re.split(r"[.\[]", setting))
        for depth in range(len(keys), 0, -1):
            if keys[:depth] in self.elsewhere:
                return self.elsewhere[keys[:depth]]
        if self.config is not None and keys[0] in self.in_file:
            return f"{self.config}: {setting}"
        if any(len(stated) > 1 and stated[:-1] == keys[:-1] for stated in self.elsewhere):
            return PREFIX + "_".join(keys).upper()  # others of its mapping are variables: so would it be
        return setting

    def located(self, message: str) -> str:
        """Replace the settings before the first colon of a message by where they were stated.

        Variables of other settings that the message names are added: they may be the ones to change.
        """
        subject, colon, problem = message.partition(": ")
        if not colon:
            return message
        stated = [self.name(each) for each in subject.split(", ")]
        named = {keys[-1]: place for keys, place in self.elsewhere.items() if "_" in keys[-1] and place not in stated}
        others = [f"{name} is set by {place}" for name, place in named.items() if re.search(rf"\b{name}\b", problem)]
        added = f" ({', '.join(others)})" if others else ""
        return f"{', '.join(stated)}: {problem}{added}"


def format_validation_error(error: ValidationError, origins: Origins, nested: Mapping[str, Collection[str]]) -> str:
    """Say in one line where, which key and what was wrong, with the value unless it may be a secret.

    Args:
        nested: the keys of the settings that are mappings themselves.
    """
    problem = min(error.errors(include_url=False), key=lambda found: found["type"] not in _UNKNOWN_KEY_ERRORS)
    if problem["type"] in _UNKNOWN_KEY_ERRORS:
        where = origins.name(".".join(map(str, problem["loc"][:-1])))
        return str(unknown_key_error(where, problem["loc"][-1], nested[str(problem["loc"][0])]))
    keys = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]]
    path = "".join(keys).removeprefix(".")
    stated = problem["msg"].removeprefix("Value error, ")
    message = _MESSAGES.get(problem["type"], stated[:1].lower() + stated[1:])
    # A check of several settings names the one that is wrong itself.
    separator = "." if path in nested and message.partition(": ")[0] in nested[path] else ": "
    whole = f"{path}{separator if path else ''}{message}{_got(problem['input'], message, problem['loc'])}"
    return origins.located(whole)


# Reported first: an unknown key is often the reason why another one is missing.
_UNKNOWN_KEY_ERRORS = ("extra_forbidden", "unexpected_keyword_argument")


def _got(value: object, message: str, where: Collection[int | str]) -> str:
    if not isinstance(value, (str, int, float, bool)) or _SECRET_SETTINGS.intersection(map(str, where)):
        return ""
    return "" if "got " in message or repr(value) in message else f"; got {value!r}"
