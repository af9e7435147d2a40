"""The types that settings are made of: names, amounts, references to the environment. No setting itself."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from proxy.settings_sources import SettingsError, split_list
from router_core.types import DEAREST

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}")
RESERVED_NAMES = frozenset({"auto", "uniroute/auto", "uniroute/best", "uniroute/cheap"})
_REFERENCE = "os.environ/"

Forward = Literal["relay", "translate", "auto"]
"""How requests reach a model: as they are, or in its provider's own format, or as is right for the provider."""


def check_model_name(name: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"a model name is 1 to 128 of A-Z a-z 0-9 . _ : / @ - and starts with a letter or digit; got {name!r}"
        )
    if {".", ".."}.intersection(name.split("/")):
        raise ValueError(f"a model name is part of a URL and cannot hold the steps . and .. ; got {name!r}")
    if name in RESERVED_NAMES:
        raise ValueError(f"{name!r} is the name that asks for routing; give the model another name")
    return name


def referred_variable(value: object, allowed_env: Collection[str] = ()) -> str | None:
    """NAME of `os.environ/NAME`, None for any other value. SettingsError if that variable may not be used."""
    if not isinstance(value, str) or not value.startswith(_REFERENCE):
        return None
    name = value.removeprefix(_REFERENCE)
    if name.startswith("UNIROUTE_") or not (name.endswith("_API_KEY") or name in allowed_env):
        raise SettingsError(
            f"{value}: only variables named *_API_KEY, or listed in allowed_env, may be used; got {name!r}"
        )
    return name


def resolve_secret(value: str, environ: Mapping[str, str], allowed_env: Collection[str] = ()) -> str:
    """`os.environ/NAME` → the variable's value; other text is itself. SettingsError if NAME is unset or not allowed."""
    name = referred_variable(value, allowed_env)
    if name is None:
        return value
    if not environ.get(name):
        raise SettingsError(f"{value}: the environment variable {name} is not set; export it before starting")
    return environ[name]


def _finite_at_least_zero(value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"must be a finite number, 0 or more; got {value!r}")
    return value


def _not_boolean(value: object) -> object:
    """YAML's `yes` and `on` are booleans, which would pass for the number 1."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number; got {str(value).lower()}")
    return value


def _as_written(value: object) -> object:
    """YAML's `on` and `off` are booleans, and a variable of the environment may say so in other words."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return _SWITCHED.get(value.lower(), value) if isinstance(value, str) else value


_SWITCHED = {**dict.fromkeys(("true", "yes", "1"), "on"), **dict.fromkeys(("false", "no", "0"), "off")}


Amount = Annotated[float, BeforeValidator(_not_boolean), AfterValidator(_finite_at_least_zero)]
Whole = Annotated[int, BeforeValidator(_not_boolean)]
Count = Annotated[Whole, Field(ge=1, le=10**12)]
Seconds = Annotated[Amount, Field(gt=0)]
TokenCost = Annotated[Amount, Field(le=DEAREST)]
Switch = Annotated[Literal["off", "auto", "on"], BeforeValidator(_as_written)]
Names = Annotated[tuple[str, ...], BeforeValidator(split_list)]
ModelName = Annotated[str, AfterValidator(check_model_name)]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, protected_namespaces=())
