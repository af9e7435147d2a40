"""What an administrator is shown of a model: card, price with its age, state, profile, job. Never a key."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

from proxy.errors import UnknownName
from proxy.jobs.records import Job
from proxy.routes.admin_bodies import shown_params
from proxy.services import Services
from proxy.storage.models import LivePrice, ModelRecord
from proxy.storage.redis import StoreUnavailable
from proxy.storage.snapshot import RoutingState

Known = TypeVar("Known")


async def cards_of(services: Services) -> list[dict[str, Any]]:
    """A card of every model, by name, without the profile's figures."""
    state = services.state.current
    jobs = await _known(services, services.jobs.latest) or {}
    cards = [_card(state, name, jobs.get(name), with_profile=False) for name in sorted(state.models)]
    return [{**card, "health": services.health.standing(card["model_name"])} for card in cards]


async def card_of(services: Services, name: str, *, with_profile: bool) -> dict[str, Any]:
    job = await _known(services, lambda: services.jobs.for_model(name))
    state = services.state.current
    if name not in state.models:
        raise UnknownName(f"the model {name!r} was removed just now", param="model")
    return {**_card(state, name, job, with_profile=with_profile), "health": services.health.standing(name)}


def _card(state: RoutingState, name: str, job: Job | None, *, with_profile: bool) -> dict[str, Any]:
    record = state.models[name]
    standing, why = _standing(state, record, job)
    profile = state.profiles.get(name)
    card: dict[str, Any] = {
        "model_name": name,
        "litellm_params": shown_params(record.litellm_params),
        "model_info": record.info.model_dump(exclude_defaults=True),
        "source": record.source,
        "created_at": _rfc3339(record.created_at),
        "state": standing,
        "why": why,
        "warning": None if profile is None else state.measuring_doubt,
        "price": _price(state.prices.get(name)),
        "job": None if job is None else job.to_json(),
    }
    if with_profile:
        card["profile"] = None if profile is None else profile.to_json(state.pool.errors[state.pool.index[name]])
    elif profile is not None:
        card["mean_error"], card["measured_at"] = profile.mean_error, profile.measured_at
    return card


def _standing(state: RoutingState, record: ModelRecord, job: Job | None) -> tuple[str, str | None]:
    """And why, where it is not measured as it is now."""
    standing, why = state.standing(record.name), state.set_aside.get(record.name)
    if standing not in ("unprofiled", "foreign_profile") or job is None:
        return standing, why
    if job.unfinished:
        return "profiling", why
    failed = job.state == "failed" and job.fingerprint in ("", record.fingerprint)
    return ("failed", job.error) if failed else (standing, why)


async def _known(services: Services, ask: Callable[[], Awaitable[Known]]) -> Known | None:
    """None while Redis is away: reading models needs no jobs, and does not wait for them."""
    if not services.state.available:
        return None
    try:
        return await ask()
    except StoreUnavailable:
        return None


def _price(live: LivePrice | None) -> dict[str, Any] | None:
    if live is None:
        return None
    since = live.updated_at
    return {
        **live.price.stated(),
        "source": live.source,
        "updated_at": None if since is None else _rfc3339(since),
        "age_s": None if since is None else round(max(0.0, time.time() - since), 3),
    }


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
