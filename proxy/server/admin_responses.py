from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from proxy.errors import ModelNotFound
from proxy.profiling.job_store import Job
from proxy.server.admin_bodies import ProfileDocument
from proxy.server.dependencies import AppState
from proxy.server.openapi import UNSET
from proxy.settings.redaction import redact_value
from proxy.settings.schema import Settings
from proxy.storage.client_keys import ROLES
from proxy.storage.controls import LAMBDA
from proxy.storage.feedback import comparison
from proxy.storage.records import CurrentPrice, ModelRecord
from proxy.storage.redis import StoreUnavailable
from proxy.storage.snapshot import RoutingSnapshot
from proxy.storage.variants import joint_fingerprint
from router_core.text import rfc3339

# Whole numbers stay whole: 5 is not shown as 5.0.
Number = Annotated[int | float, WithJsonSchema({"type": "number"})]

Amount = Annotated[int | float, WithJsonSchema({"type": "number", "minimum": 0})]

Count = Annotated[int, WithJsonSchema({"type": "integer", "minimum": 0})]


def one_of(*values: str) -> WithJsonSchema:
    """Name the values of a text in the document; a response is not held to them."""
    return WithJsonSchema({"enum": list(values)})


class ResponseModel(BaseModel):
    """The JSON of a response."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class OpenResponseModel(ResponseModel):
    """The JSON of a response that may have more fields than are listed."""

    model_config = ConfigDict(extra="allow")


class ModelPrice(OpenResponseModel):
    """The price that is in force, in USD per token, with the prices of tiers under LiteLLM's names."""

    input_cost_per_token: Amount
    output_cost_per_token: Amount
    cache_read_input_token_cost: Amount = UNSET
    cache_creation_input_token_cost: Amount = UNSET
    cache_creation_input_token_cost_above_1hr: Amount = UNSET
    input_cost_per_audio_token: Amount = UNSET
    cache_read_input_audio_token_cost: Amount = UNSET
    input_cost_per_image_token: Amount = UNSET
    output_cost_per_reasoning_token: Amount = UNSET
    output_cost_per_audio_token: Amount = UNSET
    output_cost_per_image_token: Amount = UNSET
    source: str
    updated_at: str | None
    age_s: Amount | None


class JobStatus(OpenResponseModel):
    id: str
    model: str
    state: Annotated[str, one_of("queued", "running", "ready", "failed", "cancelled")]
    done: Count
    total: Count
    failed: Count
    unlabelled: Count
    spent_usd: Number | None
    eta_s: Number | None
    error: str | None
    warning: str = UNSET


class ObservedRates(OpenResponseModel):
    """What feedback says of a model since it was measured, beside what was expected of the same answers.

    Rates are null where there is no label; `p` and `differs` are where there are too few. `change` is the hour from
    which on the answers are graded otherwise than before, if there is one: then all but `clusters` is of those since.
    """

    since: str | None
    labels: Amount
    measured_labels: Amount
    mean_error: Amount | None
    mean_error_low: Amount | None
    mean_error_high: Amount | None
    measured_mean_error: Amount | None
    measured_mean_error_low: Amount | None
    measured_mean_error_high: Amount | None
    test: str
    p: Amount | None
    differs: bool | None
    change: dict[str, Any] | None
    clusters: list[dict[str, Any]]


class ModelCard(OpenResponseModel):
    model_name: str
    litellm_params: dict[str, Any]
    model_info: dict[str, Any]
    source: Annotated[str, one_of("config", "admin")]
    created_at: str
    state: str
    why: str | None
    warning: str | None
    paused: bool
    paused_at: str | None
    paused_by: str | None
    price: ModelPrice | None
    job: JobStatus | None
    effort: str | int | None
    """Of an effort of a model: its name, or its budget in tokens of thinking."""
    effort_of: str | None
    """The model of which it is an effort."""
    efforts: list[str]
    """The names of its own efforts, ascending."""
    profile: ProfileDocument | None = None
    mean_error: Number = UNSET
    measured_at: str | None = None
    observed: ObservedRates | None = None
    health: dict[str, Any]


class ModelCards(ResponseModel):
    models: list[ModelCard]
    state_version: Count


class ChangedCluster(ResponseModel):
    """How much a model's error rate has changed in one cluster. `name` is null if it is of another map."""

    id: Count
    name: str | None
    change: Number
    labels_before: Amount
    labels: Amount


class ChangedProfile(ResponseModel):
    """How a profile differs from the one before. `p` is null where there are too few labels, and `differs` too.

    `clusters`: those that changed most; none if the maps differ.
    """

    mean_error: Number
    test: str
    p: Amount | None
    differs: bool | None
    same_map: bool
    same_parameters: bool
    clusters: list[ChangedCluster]


class PastProfile(ResponseModel):
    """A profile as it was stored: what it said, and where it came from. The bounds hold with 90 % confidence."""

    stored_at: str
    measured_at: str | None
    source: Annotated[str, one_of("job", "carried_over", "upload")]
    job: str | None
    map: str
    recipe: str | None
    fingerprint: str
    mean_error: Amount
    error_low: Amount
    error_high: Amount
    total_labels: Amount
    spent_usd: Amount | None
    mean_output_tokens: Amount | None
    mean_seconds: Amount | None
    error_sums: list[Amount]
    labels: list[Amount]
    change: ChangedProfile | None


class PastProfiles(ResponseModel):
    model: str
    profiles: list[PastProfile]


class Accepted(ResponseModel):
    """`job`: the id of the job that measures the model, if one was needed."""

    model: str
    job: str | None


class PricedModel(ResponseModel):
    model: str
    price: ModelPrice | None


class JobOutcomes(ResponseModel):
    outcomes: list[dict[str, Any]]


class KeyCard(ResponseModel):
    id: str
    name: str
    role: Annotated[str, one_of(*ROLES)]
    models: list[str] | None
    tags: list[str]
    created_at: str | None
    expires_at: str | None
    revoked: bool
    lambda_default: Amount | None
    lambda_min: Amount | None
    lambda_max: Amount | None
    requests_per_minute: Count | None
    tokens_per_minute: Count | None
    usd_per_day: Amount | None
    usd_per_month: Amount | None
    previous_secret_until: str | None


class KeyWithSecret(KeyCard):
    key: str


class KeyCards(ResponseModel):
    keys: list[KeyCard]


class DecisionRow(OpenResponseModel):
    """A decision in a list: without its candidates, clusters and attempts."""

    id: str
    request: str
    received_at: str
    key: str | None
    tags: list[str]
    api: str
    requested: str
    model: str
    reason: str
    ending: str
    cost_usd: Number | None
    saved_usd: Number | None


class Decisions(ResponseModel):
    decisions: list[DecisionRow]
    next: str | None


class DecisionCluster(ResponseModel):
    id: Count
    name: str
    weight: Number


class DecisionCandidate(ResponseModel):
    model: str
    expected_error: Number
    trajectory_error: Number
    expected_cost_usd: Number
    cost: Number
    score: Number
    flips_at_lambda: Number | None


class DecisionAttempt(ResponseModel):
    model: str
    outcome: str | None
    status: str | None
    started_s: Number
    ended_s: Number | None


class KeptDecision(DecisionRow):
    """A whole decision. Times in seconds are from the request's arrival."""

    ended_at: str
    expected_error: Number | None
    state_version: Count
    map: str
    fingerprint: str | None
    score: Number | None
    score_source: str | None
    clusters: list[DecisionCluster]
    nearest_cosine: Number | None
    novel: bool | None
    trajectory: dict[str, Number] | None
    candidates: list[DecisionCandidate]
    candidates_left_out: Count
    ineligible: list[dict[str, str]]
    attempts: list[DecisionAttempt]
    times: dict[str, Number | None]
    usage: dict[str, Count | None]
    cost_estimated: bool
    failed_attempts_cost_usd: Number | None
    baseline: dict[str, Any]
    prompt: str | None


class SettingInForce(ResponseModel):
    """A setting: its value, and where it comes from. `configured` is what DELETE goes back to."""

    value: Amount
    source: Annotated[str, one_of("config", "admin")]
    configured: Amount
    set_at: str | None
    set_by: str | None


class SettingsInForce(ResponseModel):
    lambda_: SettingInForce = Field(alias="lambda")
    state_version: Count


class DaySpending(ResponseModel):
    """What all requests of a day (UTC) cost, whether their decisions are kept or not; `cost_unknown` are not in it."""

    requests: Count
    cost_usd: Amount
    cost_unknown: Count


class ProfilingSpending(ResponseModel):
    """What jobs that were submitted then have spent, judges included; `unpriced` are those of unknown price."""

    usd: Amount
    jobs: Count
    unpriced: Count
    by_model: dict[str, Amount]
    by_day: dict[str, Amount]


class Spending(ResponseModel):
    days: dict[str, DaySpending]
    profiling: ProfilingSpending


class SavingsSums(OpenResponseModel):
    """The sums of some requests. Expected errors have bounds, and so have those that feedback speaks of."""

    requests: Count
    cost_usd: Number
    baseline_usd: Number
    saved_usd: Number
    expected_error: Number | None
    baseline_expected_error: Number | None
    error_difference: Number | None
    observed_error: Number | None


class SavingsDocument(ResponseModel):
    """Sums in all and by group, the first and the last decision, and what was spent in the same time in all."""

    first: str | None
    last: str | None
    total: SavingsSums
    by: dict[str, dict[str, SavingsSums]]
    spending: Spending | None


class ReportUnderWay(ResponseModel):
    """`decisions`: how many were read so far."""

    decisions: Count


class AuditEntry(OpenResponseModel):
    at: str
    who: str
    action: str
    target: str = UNSET


class AuditEntries(ResponseModel):
    entries: list[AuditEntry]


async def models_to_json(state: AppState) -> list[dict[str, Any]]:
    """Show every model, by name, without the numbers of its profile."""
    snapshot = state.snapshots.current
    jobs = await _if_available(state, state.jobs.latest) or {}
    cards = [_card(snapshot, name, jobs.get(name), with_profile=False) for name in sorted(snapshot.models)]
    return [{**card, "health": state.health.status(card["effort_of"] or card["model_name"])} for card in cards]


async def model_to_json(state: AppState, name: str, *, with_profile: bool) -> dict[str, Any]:
    """Show one model. Raises ModelNotFound."""
    job = await _if_available(state, lambda: state.jobs.for_model(name))
    snapshot = state.snapshots.current
    if name not in snapshot.models:
        raise ModelNotFound(f"the model {name!r} was removed just now", param="model")
    card = _card(snapshot, name, job, with_profile=with_profile)
    if with_profile and name in snapshot.profiles and state.settings.feedback != "off":
        card["observed"] = await _observed(state, snapshot, name)
    return {**card, "health": state.health.status(snapshot.models[name].registered_name)}


async def _observed(state: AppState, snapshot: RoutingSnapshot, name: str) -> dict[str, Any] | None:
    """Compare what was observed of a model with what was measured; None if nothing was observed."""
    cluster_map, record = snapshot.cluster_map, snapshot.models[name]
    observed = await _if_available(state, lambda: state.feedback.observed(record, cluster_map.id, cluster_map.size))
    if observed is None:
        return None
    compared = comparison(snapshot.profiles[name], observed)
    named = [{**row, "name": cluster_map.names[row["id"]]} for row in compared["clusters"]]
    return {**compared, "clusters": named}


def settings_to_json(settings: Settings, snapshot: RoutingSnapshot) -> dict[str, Any]:
    """Show the settings that can be set while the server runs."""
    override = snapshot.lambda_override
    shown = {
        "value": snapshot.default_lambda(settings),
        "source": "config" if override is None else "admin",
        "configured": settings.lambda_,
        "set_at": None if override is None else override.since,
        "set_by": None if override is None else override.who,
    }
    return {LAMBDA: shown, "state_version": snapshot.version}


def redact_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Show litellm_params without secrets: references to the environment, but no literal keys and headers."""
    return {name: redact_value(name, value) for name, value in params.items()}


T = TypeVar("T")


async def _if_available(state: AppState, ask: Callable[[], Awaitable[T]]) -> T | None:
    """Return None while Redis is away: models can be shown without their jobs, and do not wait for them."""
    if not state.snapshots.available:
        return None
    try:
        return await ask()
    except StoreUnavailable:
        return None


def _card(snapshot: RoutingSnapshot, name: str, job: Job | None, *, with_profile: bool) -> dict[str, Any]:
    record = snapshot.models[name]
    model_state, why = _model_state(snapshot, record, job)
    profile, pause = snapshot.profiles.get(name), snapshot.paused.get(name)
    card: dict[str, Any] = {
        "model_name": name,
        "litellm_params": redact_params(record.litellm_params),
        "model_info": record.info.model_dump(exclude_defaults=True),
        "source": record.source,
        "created_at": rfc3339(record.created_at),
        "state": model_state,
        "why": why,
        "paused": pause is not None,
        "paused_at": None if pause is None else pause.since,
        "paused_by": None if pause is None else pause.who,
        "warning": None if profile is None else snapshot.measuring_doubt,
        "price": _price(snapshot.prices.get(name)),
        "job": None if job is None else job.to_json(),
        "effort": record.effort,
        "effort_of": record.base,
        "efforts": list(snapshot.efforts.get(name, ())),
    }
    if with_profile:
        card["profile"] = None if profile is None else profile.to_json(snapshot.pool.errors[snapshot.pool.index[name]])
    elif profile is not None:
        card["mean_error"], card["measured_at"] = profile.mean_error, profile.measured_at
    return card


def _model_state(snapshot: RoutingSnapshot, record: ModelRecord, job: Job | None) -> tuple[str, str | None]:
    """Return the state, and why the model is not measured as it is now."""
    model_state, why = snapshot.model_state(record.name), snapshot.unused_profiles.get(record.name)
    if model_state not in ("unprofiled", "foreign_profile") or job is None:
        return model_state, why
    if job.unfinished:
        return "profiling", why
    fingerprint = joint_fingerprint(snapshot.measured_records(record.registered_name))
    # Of several efforts, those that a job could not measure are named by its error.
    ended = job.state == "failed" or (job.state == "ready" and job.error is not None)
    failed = ended and job.fingerprint in ("", fingerprint)
    return ("failed", job.error) if failed else (model_state, why)


def _price(current: CurrentPrice | None) -> dict[str, Any] | None:
    if current is None:
        return None
    since = current.updated_at
    return {
        **current.price.to_fields(),
        "source": current.source,
        "updated_at": None if since is None else rfc3339(since),
        "age_s": None if since is None else round(max(0.0, time.time() - since), 3),
    }
