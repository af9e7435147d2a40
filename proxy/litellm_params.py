"""Shapes of litellm_params that every call of the model would stumble over. What they mean is the provider layer's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_TEXTS = ("api_base", "base_url", "api_key", "api_version", "organization", "custom_llm_provider", "system")
_OBJECTS = ("extra_body", "extra_headers", "headers")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def check_shapes(params: Mapping[str, Any]) -> None:
    """Raises ValueError naming the field."""
    for name in _TEXTS:
        if not isinstance(params.get(name), str | None):
            raise ValueError(f"litellm_params.{name} must be a text")
        if name != "system" and _CONTROL.search(params.get(name) or ""):
            raise ValueError(f"litellm_params.{name} holds a line break or another control character")
    for name in _OBJECTS:
        if not isinstance(params.get(name), dict | None):
            raise ValueError(f"litellm_params.{name} must be an object")
        for field, value in (params.get(name) or {}).items():
            if name != "extra_body" and not (isinstance(value, str) and not _CONTROL.search(field + value)):
                raise ValueError(f"litellm_params.{name}.{field} must be a text without line breaks")
