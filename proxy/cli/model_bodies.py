"""What `uniroute models` sends to the admin API, from the command line's words. Calls nothing but the embedder."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proxy.cli.console import BadArgument
from proxy.settings.schema import load_settings
from router_core.documents import MAX_PROFILE_BYTES, DocumentTooLarge, parse_json, read_bounded


def litellm_params_from(
    model: str, api_base: str | None, key_variable: str | None, extra: Sequence[str]
) -> dict[str, Any]:
    params: dict[str, Any] = {"model": model}
    if api_base:
        params["api_base"] = api_base
    if key_variable:
        params["api_key"] = f"os.environ/{key_variable.removeprefix('os.environ/')}"
    for pair in extra:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise BadArgument(f"--param takes KEY=VALUE; got {pair!r}")
        params[key] = _value(value)
    return params


def model_info_from(input_cost: float | None, output_cost: float | None, *, free: bool) -> dict[str, Any]:
    """Costs come in USD per million tokens and leave in USD per token."""
    stated = {"--input-cost": input_cost, "--output-cost": output_cost}
    if free and any(cost is not None for cost in stated.values()):
        raise BadArgument("--free and a cost contradict each other; give one of them")
    if len(missing := [name for name, cost in stated.items() if cost is None]) == 1:
        raise BadArgument(f"{missing[0]} is missing: a price has both")
    if free or input_cost is None or output_cost is None:
        return {"free": True} if free else {}
    return {"input_cost_per_token": input_cost / 1e6, "output_cost_per_token": output_cost / 1e6}


def profile_from(
    name: str, prompts: int | None, max_usd: float | None, ready: Path | None, outcomes: Path | None
) -> dict[str, Any]:
    """How to ask the model, or a profile that is handed over instead."""
    asking = {key: value for key, value in (("prompts", prompts), ("max_usd", max_usd)) if value is not None}
    if sum((bool(asking), ready is not None, outcomes is not None)) > 1:
        raise BadArgument("--profile, --outcomes, and --prompts with --max-usd exclude each other; give one of them")
    if ready is not None:
        return _read_profile(ready)
    return _from_outcomes(outcomes, name) if outcomes is not None else asking


def _read_profile(path: Path) -> dict[str, Any]:
    """A profile's own JSON, or the card that `models show` prints, which has it inside."""
    try:
        document = parse_json(read_bounded(path, MAX_PROFILE_BYTES).decode())
    except OSError as error:
        raise BadArgument(f"--profile: {path} cannot be read ({error.strerror})") from None
    except DocumentTooLarge as error:
        raise BadArgument(f"--profile: {path} {error}") from None
    except ValueError as error:
        raise BadArgument(f"--profile: {path} is not JSON ({error})") from None
    found = document.get("profile", document) if isinstance(document, dict) else None
    if not isinstance(found, dict) or not {"errors", "error_sums"} & found.keys():
        raise BadArgument(f'--profile: {path} is not a profile; it needs "map", "errors" and "labels"')
    return found


def _from_outcomes(path: Path, name: str) -> dict[str, Any]:
    """Measured here, with the map and the embedder of our own settings; the server refuses another map's profile."""
    from proxy.app import open_map
    from proxy.cli.inputs import opened_embedder, readable
    from proxy.jobs.outcomes import profile_from_outcomes

    readable(path, "--outcomes")
    config = os.environ.get("UNIROUTE_CONFIG")
    settings = load_settings(Path(config) if config else None, os.environ)
    cluster_map = open_map(settings)
    embedder = opened_embedder(settings.embedder, settings.data_dir)
    return profile_from_outcomes(path, name, cluster_map, embedder).to_json()


def _value(text: str) -> Any:
    """0.5 is a number, true a boolean, anything that is not JSON (NaN too) the text itself."""
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return text


def _no_number(word: str) -> float:
    raise ValueError(word)
