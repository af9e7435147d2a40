"""What an administrator is shown of a model: card, price with its age, state, profile, job. Never a key."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from proxy.routes.admin_bodies import shown_params
from proxy.services import Services
from proxy.state.records import LivePrice
from proxy.state.snapshot import RoutingState
from proxy.state.store import StoreUnavailable

UNFINISHED = ("queued", "running")


async def card_of(services: Services, state: RoutingState, name: str, *, with_profile: bool) -> dict[str, Any]:
    record = state.models[name]
    job = await _job(services, name)
    measuring = job is not None and job["state"] in UNFINISHED
    standing = state.standing(name)
    profile = state.profiles.get(name)
    card: dict[str, Any] = {
        "model": name,
        "litellm_params": shown_params(record.litellm_params),
        "model_info": record.info.model_dump(exclude_defaults=True),
        "source": record.source,
        "created_at": _rfc3339(record.created_at),
        "state": "profiling" if measuring and standing in ("unprofiled", "foreign_profile") else standing,
        "why": state.set_aside.get(name),
        "price": _price(state.prices.get(name)),
        "job": job,
    }
    if with_profile:
        card["profile"] = None if profile is None else profile.to_json()
    elif profile is not None:
        card["mean_error"], card["measured_at"] = profile.mean_error, profile.measured_at
    return card


async def _job(services: Services, name: str) -> dict[str, Any] | None:
    """None also while Redis is away: reading models does not need it."""
    try:
        job = await services.jobs.for_model(name)
    except StoreUnavailable:
        return None
    return None if job is None else job.to_json()


def _price(live: LivePrice | None) -> dict[str, Any] | None:
    if live is None:
        return None
    since = live.updated_at
    stated = {name: value for name, value in asdict(live.price).items() if value is not None}
    return {
        **stated,
        "source": live.source,
        "updated_at": None if since is None else _rfc3339(since),
        "age_s": None if since is None else round(max(0.0, time.time() - since), 3),
    }


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
