from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property, partial
from types import MappingProxyType

from proxy.errors import (
    BadRequest,
    ContextLengthExceeded,
    Forbidden,
    ModelNotFound,
    ModelPaused,
    NoEligibleModelError,
    NotProfiled,
    ServiceUnavailable,
)
from proxy.routing.affinity import NO_AFFINITY, Affinity
from proxy.routing.agents import COMPACTION
from proxy.routing.chat_request import NO_OPTIONS, ChatRequest, RoutingOptions
from proxy.routing.cost_weight import ALIASES, RoutingMode, cost_weight, key_allows_mode
from proxy.routing.requirements import WISHES, effort_bound, requirement_sources, requirements_of
from proxy.settings.schema import PRESET_PREFIX, Preset, Settings
from proxy.storage.client_keys import ClientKey
from proxy.storage.snapshot import RoutingSnapshot
from router_core.eligibility import Eligibility, eligible
from router_core.errors import NoEligibleModel
from router_core.scoring import ScoringParams
from router_core.types import CAPABILITY_NAMES, Requirements, frozen

# In `route_names`: every name that is not registered is routed.
ANY = "*"

CLAUDE = "claude-"

EMPTY: Mapping[str, float] = MappingProxyType({})


class SelectionContext:
    """One request against one snapshot: what it asks for, and what it may have.

    Args:
        affinity: what is remembered of the conversation that the request continues.
        cooling_down: models whose circuit is open, with the seconds until they may be asked again.
        not_ready: models that this process cannot call yet.

    Raises:
        ModelNotFound, Forbidden: of a name in the request.
        BadRequest: the request states a λ that its key may not use.
    """

    def __init__(
        self,
        decision_id: str,
        request: ChatRequest,
        key: ClientKey | None,
        snapshot: RoutingSnapshot,
        settings: Settings,
        *,
        affinity: Affinity = NO_AFFINITY,
        cooling_down: Mapping[str, float] = EMPTY,
        not_ready: Collection[str] = (),
    ) -> None:
        self.decision_id = decision_id
        self.request = request
        self.key = key
        self.snapshot = snapshot
        self.settings = settings
        self.affinity = affinity
        bound = effort_bound(request.body) if snapshot.efforts else None
        # Efforts above the one that the caller states.
        self.beyond_effort: Collection[str] = () if bound is None else snapshot.efforts_beyond(bound)
        # What a model has begun waits for that model alone, and is not taken on by another while it rests.
        producers = () if affinity.producer is None else self.names_now(affinity.producer)
        if cooling_down:
            cooling_down = _without(producers, _of_efforts_too(cooling_down, snapshot))
        self.cooling_down = cooling_down
        self.not_ready = set(not_ready).difference(producers) if not_ready and producers else not_ready
        terms = self._terms()
        self.mode = terms.mode
        self.preset = terms.preset
        self.allowed = terms.allowed
        self.params = terms.params
        self._request_terms = terms
        # What a compaction leaves out is lost for the rest of the run: a cheap one would be dear.
        self.is_housekeeping = request.housekeeping not in (None, COMPACTION) and terms.frees_housekeeping
        self.requirements = self._requirements()

    @cached_property
    def for_any_model(self) -> SelectionContext | None:
        """The same request as if it named no model; None: it names none whose efforts answer in its place."""
        if not self._request_terms.names_one_model:
            return None
        wider = copy(self)
        wider.allowed = self._request_terms.allowed_for_any_model
        return wider

    def names_now(self, name: str) -> Sequence[str]:
        """Return the names by which a model may go on with what it has begun under `name`.

        Another effort of the same model reads what it has written: where the caller now asks for less, where its
        efforts were measured or changed since, or where it has none any more.
        """
        models, measured = self.snapshot.models, self.snapshot.measured_efforts
        registered = name if name in models else name.rpartition("@")[0]
        if registered in measured and (registered == name or name not in models):
            return measured[registered]
        return (self.within_effort(name) if name in models or registered not in models else registered,)

    def within_effort(self, name: str) -> str:
        """Return a model or, if it is an effort above the caller's own, the greatest of the same model that is not."""
        if name not in self.beyond_effort:
            return name
        efforts = self.snapshot.efforts[str(self.snapshot.models[name].base)]
        return next(each for each in reversed(efforts) if each not in self.beyond_effort)

    def _terms(self) -> SelectionTerms:
        """Return the terms of this request. Those of a request without options are kept with the snapshot."""
        affinity = self.affinity
        if self.request.options is not NO_OPTIONS or affinity.last_turn is not None or affinity.stuck:
            return self._work_out_terms()
        kept, key, settings = self.snapshot.selection_terms, self.key, self.settings
        place = (self.request.model, None if key is None else key.id)
        entry: tuple[ClientKey | None, Settings, SelectionTerms] | None = kept.get(place)
        if entry is not None and entry[0] is key and entry[1] is settings:
            return entry[2]
        if len(kept) >= MAX_KEPT_TERMS:
            kept.clear()
        terms = self._work_out_terms()
        kept[place] = (key, settings, terms)
        return terms

    def _work_out_terms(self) -> SelectionTerms:
        request, settings, snapshot, key = self.request, self.settings, self.snapshot, self.key
        options = request.options
        mode = routing_mode(request.model, settings, snapshot, key)
        preset = preset_of(request.model, settings, snapshot) if settings.presets else None
        allowed = allowed_for_any_model = restrict_candidates(options, snapshot, key, preset)
        efforts = snapshot.measured_efforts.get(request.model) if mode is not RoutingMode.PINNED else None
        if efforts is not None:
            allowed = set(efforts) if allowed is None else set(efforts).intersection(allowed)
        params = ScoringParams(
            lambda_=cost_weight(request, mode, snapshot.default_lambda(settings), key, preset),
            latency_weight=settings.latency_weight if options.latency_weight is None else options.latency_weight,
            max_cost_usd=smaller(options.max_cost_usd, preset.max_cost_usd if preset else None),
            cost_unit=settings.cost_unit,
            reference=settings.reference_price,
            cached=self.affinity.cached_prompt(settings),
            doubts=tuple((model, settings.trajectory_weight * share) for model, share in self.affinity.stuck),
        )
        frees_housekeeping = self._frees_housekeeping(mode, preset)
        return SelectionTerms(
            mode,
            preset,
            allowed,
            params,
            frees_housekeeping,
            names_one_model=efforts is not None,
            allowed_for_any_model=allowed_for_any_model,
        )

    def _frees_housekeeping(self, mode: RoutingMode, preset: Preset | None) -> bool:
        """Whether a housekeeping request goes to the cheapest model: a λ that is stated comes before that."""
        return (
            self.settings.housekeeping == "cheapest"
            and mode is RoutingMode.SCORED
            and self.request.options.lambda_ is None
            and (preset is None or preset.lambda_ is None)
            and key_allows_mode(RoutingMode.CHEAP, self.key)
        )

    def _requirements(self) -> Requirements:
        """Read what the body needs of a model, at prices within the request's caps."""
        provider, clamped = self.request.options.provider, self.settings.clamp_max_tokens
        translated = self.request.translated
        return requirements_of(
            self.request.body,
            self.request.contents,
            (provider.max_input_cost_per_token, provider.max_output_cost_per_token),
            limit_is_cap=translated or clamped == "on" or (clamped == "auto" and self.mode is not RoutingMode.PINNED),
            wishes=WISHES if translated else (),
        )


def _without(names: Collection[str], models: Mapping[str, float]) -> Mapping[str, float]:
    if models.keys().isdisjoint(names):
        return models
    return {each: value for each, value in models.items() if each not in names}


# Of one snapshot: pairs of a model's name and a key.
MAX_KEPT_TERMS = 10_000


@frozen
class SelectionTerms:
    """What a request's model, options and key say of its selection, whatever its messages hold."""

    mode: RoutingMode
    preset: Preset | None
    allowed: Collection[str] | None
    """The names that may be selected; None: all."""
    params: ScoringParams
    frees_housekeeping: bool
    """Whether housekeeping goes to the cheapest model, whatever λ is."""
    names_one_model: bool = False
    """Whether a model is named whose efforts answer in its place: `allowed` holds them alone."""
    allowed_for_any_model: Collection[str] | None = None
    """The names that would be allowed if the request named no model; None: all."""


def routing_mode(name: str, settings: Settings, snapshot: RoutingSnapshot, key: ClientKey | None) -> RoutingMode:
    """Tell from the name of a model how the request is routed.

    Raises:
        ModelNotFound: no model and no alias has this name.
        Forbidden: the key may not use this model.
        BadRequest: the model answers with embeddings.
    """
    mode = alias_mode(name, settings, snapshot)
    if mode is not None:
        return mode
    if name in snapshot.models:
        check_allowed(name, key, snapshot)
        _check_chats(name, "model", snapshot)
        return RoutingMode.SCORED if name in snapshot.measured_efforts else RoutingMode.PINNED
    raise ModelNotFound(f'the model {name[:128]!r} does not exist; use "auto", or one of GET /v1/models', param="model")


def alias_mode(name: str, settings: Settings, snapshot: RoutingSnapshot) -> RoutingMode | None:
    """Return how a name that asks for routing is routed; None: it is a model's, or nothing here has it."""
    if name in ALIASES:
        return ALIASES[name]
    if name in settings.route_names and name != ANY:
        return RoutingMode.SCORED
    if settings.presets and preset_of(name, settings, snapshot) is not None:
        return RoutingMode.SCORED
    if name in snapshot.models:
        return None
    if name.startswith(CLAUDE) and (mode := claude_aliases(settings.route_names).get(name)) is not None:
        return mode
    return RoutingMode.SCORED if ANY in settings.route_names else None


def preset_of(name: str, settings: Settings, snapshot: RoutingSnapshot) -> Preset | None:
    """Return the preset that a name asks for: `uniroute/NAME` or, unless a model has that name, `claude-NAME`."""
    if name.startswith(PRESET_PREFIX):
        return settings.presets.get(name.removeprefix(PRESET_PREFIX))
    if name.startswith(CLAUDE) and name not in snapshot.models:
        return settings.presets.get(name.removeprefix(CLAUDE))
    return None


def smaller(first: float | None, second: float | None) -> float | None:
    """Return the smaller of two bounds. None: no bound."""
    return second if first is None else first if second is None else min(first, second)


def claude_aliases(route_names: Collection[str]) -> dict[str, RoutingMode]:
    """Return a name that begins with `claude` for each name that asks for routing: Claude Code offers no others.

    A registered model of such a name wins.
    """
    own = {f"{CLAUDE}{name.rpartition('/')[2]}": mode for name, mode in ALIASES.items()}
    return own | {
        f"{CLAUDE}{name}": RoutingMode.SCORED
        for name in route_names
        if name != ANY and f"{CLAUDE}{name}" not in own and not name.startswith(CLAUDE)
    }


def allowed_models(snapshot: RoutingSnapshot, key: ClientKey | None) -> tuple[str, ...]:
    """Return the names of the chat models that this key may use, sorted."""
    return tuple(name for name in snapshot.pool.names if may_use(name, key, snapshot))


def may_use(name: str, key: ClientKey | None, snapshot: RoutingSnapshot) -> bool:
    """Whether a key may use a model. One that may use a model may use its efforts."""
    if key is None or key.models is None or name in key.models:
        return True
    record = snapshot.models.get(name)
    return record is not None and record.base is not None and record.base in key.models


def _of_efforts_too(cooling_down: Mapping[str, float], snapshot: RoutingSnapshot) -> Mapping[str, float]:
    """Add the efforts of models whose circuit is open: they have one circuit."""
    if not snapshot.efforts:
        return cooling_down
    more = {each: wait for name, wait in cooling_down.items() for each in snapshot.efforts.get(name, ())}
    return {**cooling_down, **more}


def restrict_candidates(
    options: RoutingOptions, snapshot: RoutingSnapshot, key: ClientKey | None, preset: Preset | None = None
) -> Collection[str] | None:
    """Return the names that the key, the preset and each list of the request allow; None: all.

    A name to be ignored need not exist: then it is no candidate anyway.

    Raises:
        ModelNotFound, Forbidden, BadRequest: of a name that the request lists.
    """
    lists = [
        _checked(options.models, "models", snapshot, key),
        _checked(options.provider.only, "provider.only", snapshot, key),
    ]
    if key is not None:
        lists.append(key.models)
    if preset is not None:
        lists.append(preset.models)
    restricting = [set(snapshot.with_efforts(names)) for names in lists if names is not None]
    if not options.provider.ignore:
        return set.intersection(*restricting) if restricting else None
    ignored = snapshot.with_efforts(options.provider.ignore)
    return set.intersection(set(snapshot.models), *restricting).difference(ignored)


def _checked(
    names: tuple[str, ...] | None, param: str, snapshot: RoutingSnapshot, key: ClientKey | None
) -> tuple[str, ...] | None:
    for name in names or ():
        if name not in snapshot.models:
            raise ModelNotFound(f"the model {name[:128]!r} of `{param}` does not exist", param=param)
        check_allowed(name, key, snapshot)
        _check_chats(name, param, snapshot)
    return names


def check_allowed(name: str, key: ClientKey | None, snapshot: RoutingSnapshot) -> None:
    """Raise Forbidden if a key may not use a model."""
    if not may_use(name, key, snapshot):
        raise Forbidden(f"this key may not use the model {name!r}", param="model")


def _check_chats(name: str, param: str, snapshot: RoutingSnapshot) -> None:
    if name in snapshot.embeddings:
        raise BadRequest(f"{name!r} answers with embeddings, at /v1/embeddings; name a chat model here", param=param)


class IneligibleReasons(Mapping[str, str]):
    """Say why models were ruled out, of those that the caller may use.

    Few requests ask for it, so it is worked out when one does. `but`: a model that is left out.
    """

    def __init__(self, ctx: SelectionContext, eligibility: Eligibility | None, *, but: str | None = None) -> None:
        self._ctx = ctx
        self._eligibility = eligibility
        self._but = but

    @cached_property
    def _reasons(self) -> dict[str, str]:
        why = self._eligibility.reasons if self._eligibility else {}
        # a model whose efforts answer in its place is no candidate, which is no news of this request
        usable = set(allowed_models(self._ctx.snapshot, self._ctx.key)) - {self._but}
        usable -= self._ctx.snapshot.measured_efforts.keys()
        return {name: reason for name, reason in why.items() if name in usable}

    def __getitem__(self, name: str) -> str:
        return self._reasons[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._reasons)

    def __len__(self) -> int:
        return len(self._reasons)


def no_candidate_error(ctx: SelectionContext, eligibility: Eligibility) -> NoEligibleModelError | ServiceUnavailable:
    """Say why no model is left, and what would help."""
    pool, requirements, allowed = ctx.snapshot.pool, ctx.requirements, ctx.allowed
    if not allowed_models(ctx.snapshot, ctx.key):
        return ServiceUnavailable("no model is registered that this request may use")
    if not _candidates(ctx):
        return NoEligibleModelError(
            "`models`, `provider.only` and `provider.ignore` together leave no model"
            f"{' of those of the preset' if ctx.preset else ''}",
            param="provider",
        )
    reasons = listed(_of_candidates(ctx, eligibility.reasons))
    profiled = bool(eligible(pool, Requirements(), allowed).rows.size)
    able = partial(eligible, pool, allowed=allowed, require_profile=profiled)
    fitting = able(requirements, beyond_effort=ctx.beyond_effort)
    if not profiled:
        if (paused := _paused_error(ctx, reasons)) is not None:
            return paused
        if fitting.rows.size or not able(Requirements()).rows.size:
            return NotProfiled(f"no model can be chosen yet{reasons}", _of_candidates(ctx, eligibility.reasons))
        # No profile would help, and the client need not wait for one.
        reasons = listed(_of_candidates(ctx, fitting.reasons))
    if fitting.rows.size:
        return ServiceUnavailable(f"every model that can take this request rests after failures{reasons}")
    if able(replace(requirements, prompt_tokens=0), beyond_effort=ctx.beyond_effort).rows.size:
        limit = requirements.max_output_tokens
        and_answer = "" if limit is None else f", and {limit} of an answer,"
        return ContextLengthExceeded(
            f"the request of about {requirements.prompt_tokens} tokens{and_answer} fits no model's context window"
            f"{reasons}",
            param="messages",
        )
    return NoEligibleModelError(f"no model can take this request{_which_needs(ctx)}{reasons}")


def _paused_error(ctx: SelectionContext, reasons: str) -> ModelPaused | None:
    """Say that a model would be chosen if it went on. None: no pause is what keeps a model away."""
    paused = ctx.snapshot.paused.keys() & _candidates(ctx)
    if paused and len(paused) == len(_candidates(ctx)):
        return ModelPaused(f"every model that this request may use is paused{reasons}")
    if any(name in ctx.snapshot.profiles for name in paused):
        return ModelPaused(f"every measured model that this request may use is paused{reasons}")
    return None


def over_cost_error(ctx: SelectionContext, error: NoEligibleModel) -> NoEligibleModelError:
    """Say that models could answer, but none of them within max_cost_usd."""
    return NoEligibleModelError(f"{error}{listed(_of_candidates(ctx, error.reasons))}", param="uniroute.max_cost_usd")


def _candidates(ctx: SelectionContext) -> Collection[str]:
    """Return the names that this caller and this request allow. No error names others."""
    usable = set(allowed_models(ctx.snapshot, ctx.key)) - ctx.snapshot.measured_efforts.keys()
    return usable if ctx.allowed is None else usable & set(ctx.allowed)


def _of_candidates(ctx: SelectionContext, why: Mapping[str, str]) -> dict[str, str]:
    candidates = _candidates(ctx)
    return {name: reason for name, reason in why.items() if name in candidates}


MAX_LISTED = 10

MAX_LISTED_CHARS = 2_000


def listed(reasons: Mapping[str, str]) -> str:
    """Return " (name: reasons; name: reasons; and 90 more)", of bounded length."""
    shown: list[str] = []
    length = 0
    for name, reason in reasons.items():
        length += len(name) + len(reason)
        if len(shown) == MAX_LISTED or length > MAX_LISTED_CHARS:
            break
        shown.append(f"{name}: {reason}")
    more = f"; and {len(reasons) - len(shown)} more" if len(reasons) > len(shown) else ""
    return f" ({'; '.join(shown)}{more})" if reasons else ""


def _which_needs(ctx: SelectionContext) -> str:
    """Return ", which needs a model to read images (messages[3] has image_url)…"."""
    sources = requirement_sources(ctx.request.body)
    needs = [f"to {words} ({sources[name]})" for name, words in CAPABILITY_NAMES.items() if name in sources]
    return f", which needs a model {', '.join(needs)}" if needs else ""
