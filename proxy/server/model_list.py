"""The models that a key may use, in the shapes that clients read.

One body serves most: OpenAI's `data`, whose items also have OpenRouter's fields, and Codex's `models` beside it. With
the header `anthropic-version` it is a page of Anthropic's, for the fields of the two contradict each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query
from fastapi.responses import JSONResponse
from pydantic import WithJsonSchema

from proxy.errors import BadRequest, ModelNotFound
from proxy.routing.cost_weight import ALIASES, RoutingMode, key_allows_mode, key_allows_preset
from proxy.routing.selection_context import (
    ANY,
    CLAUDE,
    alias_mode,
    allowed_models,
    claude_aliases,
    may_use,
    preset_of,
)
from proxy.server.admin_responses import Count, OpenResponseModel, ResponseModel
from proxy.server.dependencies import AppState, AppStateDep, CurrentKey
from proxy.server.openapi import COMMON_ERRORS, MODEL_NAME_SCHEMA, UNSET, client_key, errors
from proxy.settings.schema import PRESET_PREFIX, Preset
from proxy.storage.client_keys import ClientKey
from proxy.storage.records import ModelRecord
from router_core.text import rfc3339
from router_core.types import CAPABILITY_NAMES, UNKNOWN_CAPABILITIES, Capabilities, Price

router = APIRouter(
    tags=["models"],
    default_response_class=JSONResponse,
    dependencies=[Depends(client_key)],
    responses=COMMON_ERRORS,
)

MAX_PAGE = 1000

DEFAULT_PAGE = 20

MAX_DESCRIPTION_CHARS = 400


class Model(OpenResponseModel):
    """A model as OpenAI lists it, with what OpenRouter adds. What is not known is left out."""

    id: str
    object: Annotated[str, WithJsonSchema({"const": "model"})]
    created: Count
    owned_by: str
    name: str
    description: str
    context_length: Count = UNSET
    paused: bool = UNSET
    architecture: dict[str, Any]
    pricing: dict[str, str] = UNSET
    supported_parameters: list[str]
    top_provider: dict[str, Any]


class ModelList(ResponseModel):
    object: Annotated[str, WithJsonSchema({"const": "list"})]
    data: list[Model]
    models: list[dict[str, Any]]
    """The same for Codex."""


class AnthropicModel(ResponseModel):
    """A model as Anthropic lists it."""

    type: Annotated[str, WithJsonSchema({"const": "model"})]
    id: str
    display_name: str
    created_at: str
    lifecycle: str
    max_input_tokens: Count | None
    max_tokens: Count | None


class AnthropicModelPage(ResponseModel):
    data: list[AnthropicModel]
    has_more: bool
    first_id: str | None
    last_id: str | None


ModelNamePath = Annotated[str, Path(), WithJsonSchema(MODEL_NAME_SCHEMA)]

AnthropicVersion = Annotated[
    str | None, Header(alias="anthropic-version", description="Sent by clients that read Anthropic's shape.")
]

PageSize = Annotated[int, Query(ge=1, le=MAX_PAGE, description="Of one page in Anthropic's shape.")]

Cursor = Annotated[str | None, Query(description="The page in Anthropic's shape before or after this model.")]


@router.get(
    "/v1/models",
    summary="The models that this key may use",
    response_model=ModelList | AnthropicModelPage,
    response_model_exclude_unset=True,
)
async def list_models(
    state: AppStateDep,
    key: CurrentKey,
    version: AnthropicVersion = None,
    limit: PageSize = DEFAULT_PAGE,
    before_id: Cursor = None,
    after_id: Cursor = None,
) -> dict[str, Any]:
    catalog = ModelCatalog(state, key)
    entries = list(catalog.entries())
    if version is not None:
        named = {entry.name: entry for entry in (*catalog.claude_entries(), *entries)}
        return _page(list(named.values()), limit, before_id, after_id)
    return {
        "object": "list",
        "data": [entry.to_openai() for entry in entries],
        "models": [entry.to_codex(place) for place, entry in enumerate(entries) if not entry.embeds],
    }


@router.get(
    "/v1/models/{name:path}",
    summary="One of them",
    response_model=Model | AnthropicModel,
    response_model_exclude_unset=True,
    responses=errors(404),
)
async def get_model(
    name: ModelNamePath, state: AppStateDep, key: CurrentKey, version: AnthropicVersion = None
) -> dict[str, Any]:
    entry = ModelCatalog(state, key).find(name)
    if entry is None or (version is not None and entry.embeds):
        raise ModelNotFound(f"the model {name[:128]!r} does not exist, or this key may not use it", param="model")
    return entry.to_openai() if version is None else entry.to_anthropic()


# What clients show of a name that asks for routing.
_DESCRIPTIONS = {
    RoutingMode.SCORED: "Chooses for each prompt the model that is expected to answer well for its price.",
    RoutingMode.BEST: "Chooses for each prompt the model that is expected to answer best, at any price.",
    RoutingMode.CHEAP: "Chooses the cheapest model that can take the request.",
    RoutingMode.PINNED: "This model alone, without routing.",
}


_PAUSED = "This model is paused: it answers again once it goes on."


class ModelCatalog:
    """The names that one key may use, with what is known of each."""

    def __init__(self, state: AppState, key: ClientKey | None) -> None:
        self._snapshot = state.snapshots.current
        self._settings = state.settings
        self._key = key

    def entries(self) -> Iterator[CatalogEntry]:
        """Yield the names that ask for routing, then the chat models, then those that answer with embeddings."""
        route_names = (name for name in self._settings.route_names if name != ANY)
        presets = (f"{PRESET_PREFIX}{name}" for name in self._settings.presets)
        for name in dict.fromkeys((*ALIASES, *presets, *route_names)):
            yield from self._alias(name)
        for name in allowed_models(self._snapshot, self._key):
            yield self._model(name)
        for name in sorted(self._snapshot.embeddings):
            if may_use(name, self._key, self._snapshot):
                yield self._model(name)

    def claude_entries(self) -> Iterator[CatalogEntry]:
        """Yield the aliases that begin with `claude`."""
        presets = (f"{CLAUDE}{name}" for name in self._settings.presets)
        for name in (*claude_aliases(self._settings.route_names), *presets):
            yield from self._alias(name)

    def find(self, name: str) -> CatalogEntry | None:
        """Return what a name stands for, also one that is routed but not listed."""
        if alias_mode(name, self._settings, self._snapshot) is not None:
            return next(self._alias(name), None)
        known = name in self._snapshot.models and may_use(name, self._key, self._snapshot)
        return self._model(name) if known else None

    def _alias(self, name: str) -> Iterator[CatalogEntry]:
        """Yield a name that asks for routing; nothing if it is a model's, or this key may not ask so."""
        mode = alias_mode(name, self._settings, self._snapshot)
        if mode is None or not key_allows_mode(mode, self._key):
            return
        shown = "UniRoute " + name.removeprefix(CLAUDE).removeprefix("uniroute/")
        preset = preset_of(name, self._settings, self._snapshot)
        if preset is None:
            able = self._abilities(allowed_models(self._snapshot, self._key))
            yield CatalogEntry(name, shown, _DESCRIPTIONS[mode], 0, "uniroute", able, None)
            return
        usable = allowed_models(self._snapshot, self._key)
        named = None if preset.models is None else self._snapshot.with_efforts(preset.models)
        models = [model for model in usable if named is None or model in named]
        if key_allows_preset(preset, self._key) and models:
            alone = len({self._snapshot.models[model].registered_name for model in models}) == 1
            price = self._snapshot.prices.get(models[0]) if alone else None
            yield CatalogEntry(
                *(name, shown, describe_preset(preset), 0, "uniroute", self._abilities(models)),
                None if price is None else price.price,
            )

    def _model(self, name: str) -> CatalogEntry:
        snapshot, record = self._snapshot, self._snapshot.models[name]
        embeds, price, paused = name in snapshot.embeddings, snapshot.prices.get(name), name in snapshot.paused
        return CatalogEntry(
            name,
            name,
            _PAUSED if paused else "Answers with embeddings." if embeds else self._description(record),
            int(record.created_at),
            record.source,
            snapshot.embeddings[name] if embeds else snapshot.pool.candidates[name].capabilities,
            None if price is None else price.price,
            embeds,
            paused,
        )

    def _description(self, record: ModelRecord) -> str:
        if record.name in self._snapshot.measured_efforts:
            return "This model alone, at the effort that each prompt is expected to need for its price."
        if record.effort is not None:
            return f"{record.base} at the effort {record.effort}, without routing."
        return _DESCRIPTIONS[RoutingMode.PINNED]

    def _abilities(self, models: Sequence[str]) -> Capabilities:
        candidates, paused = self._snapshot.pool.candidates, self._snapshot.paused
        return widest([candidates[name].capabilities for name in models if name not in paused])


def describe_preset(preset: Preset) -> str:
    """Say in a sentence what a preset asks for, as clients show it."""
    parts = [
        *([] if preset.lambda_ is None else [f"at λ = {preset.lambda_:g}"]),
        *([] if preset.models is None else [f"among {', '.join(preset.models)}"]),
        *([] if preset.max_cost_usd is None else [f"for at most ${preset.max_cost_usd:g} a request"]),
    ]
    return " ".join(["Chooses a model for each prompt", *parts])[:MAX_DESCRIPTION_CHARS] + "."


def widest(models: Sequence[Capabilities]) -> Capabilities:
    """Return what the models can take between them: a request goes to one that can take it."""
    if not models:
        return UNKNOWN_CAPABILITIES
    abilities = {}
    for name in CAPABILITY_NAMES:
        known = {getattr(model, name) for model in models}
        abilities[name] = True if True in known else None if None in known else False
    limits = {
        name: max((limit for model in models if (limit := getattr(model, name)) is not None), default=None)
        for name in ("max_input_tokens", "max_output_tokens")
    }
    return Capabilities(**limits, **abilities)


# OpenAI's parameters that nearly all models take.
_COMMON_PARAMETERS = ("max_tokens", "temperature", "top_p", "stop")

# Parameters by the capability that they need, as OpenRouter names them.
_PARAMETERS_OF = {
    "tools": ("tools", "tool_choice"),
    "parallel_tools": ("parallel_tool_calls",),
    "json_schema": ("response_format", "structured_outputs"),
    "reasoning": ("reasoning", "include_reasoning", "reasoning_effort"),
}

# Modality by the capability to read it.
_INPUT_MODALITIES = {"vision": "image", "audio_input": "audio", "video": "video", "files": "file"}

# Without instructions Codex does not read an entry, and those that an entry brings replace its own.
_CODEX_INSTRUCTIONS = """\
You are a coding agent. You work in a user's folder through the Codex CLI, with the tools that you are given.

- Read before you change: look at the code, its tests, and files such as AGENTS.md, whose instructions you follow.
  Search with `rg`. Never guess what a file or the output of a command holds.
- Do what was asked, all of it and nothing else. Keep to the conventions of the project, make small and exact edits,
  and leave alone what is not yours, changes of others that are not committed included.
- Go on until the task is done. Run the tests, or the program, and fix what you broke. A command may need the user's
  approval; if it is refused, find another way or say what you would have run.
- Before a longer step, say in one sentence what you are about to do. At the end, say in a few sentences what you
  changed, how you checked it, and what is left.
"""

_REASONING_LEVELS = {
    "low": "Answers soon",
    "medium": "Thinks where it helps",
    "high": "Thinks longest, for hard problems",
}


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One name that requests may be sent to."""

    name: str
    display_name: str
    description: str
    created_at: int
    """Unix seconds; 0 of a name that asks for routing."""
    owner: str
    capabilities: Capabilities
    price: Price | None
    """None: it is not known, or depends on the model that is chosen."""
    embeds: bool = False
    paused: bool = False

    def to_openai(self) -> dict[str, Any]:
        """Return the item with OpenRouter's fields. Prices are text, in USD per token."""
        able, window = self.capabilities, self.capabilities.max_input_tokens
        return {
            "id": self.name,
            "object": "model",
            "created": self.created_at,
            "owned_by": self.owner,
            "name": self.display_name,
            "description": self.description,
            **({} if window is None else {"context_length": window}),
            **({"paused": True} if self.paused else {}),
            "architecture": self._architecture(),
            **({} if self.price is None else {"pricing": _pricing(self.price)}),
            "supported_parameters": ["dimensions", "encoding_format"] if self.embeds else _parameters(able),
            "top_provider": {
                "context_length": window,
                "max_completion_tokens": able.max_output_tokens,
                "is_moderated": False,
            },
        }

    def to_codex(self, place: int) -> dict[str, Any]:
        """Return the entry with every field that Codex has no default for. `place`: in the list; the first leads."""
        able = self.capabilities
        levels = [{"effort": effort, "description": text} for effort, text in _REASONING_LEVELS.items()]
        return {
            "slug": self.name,
            "display_name": self.display_name,
            "description": self.description,
            "default_reasoning_level": None,  # the model's own
            "supported_reasoning_levels": levels if able.reasoning else [],
            "shell_type": "shell_command",
            "visibility": "list",
            "supported_in_api": True,
            "priority": place,
            "upgrade": None,
            "base_instructions": _CODEX_INSTRUCTIONS,
            "supports_reasoning_summaries": able.reasoning is True,
            "support_verbosity": False,
            "default_verbosity": None,
            "apply_patch_tool_type": None,
            "truncation_policy": {"mode": "tokens", "limit": 10_000},
            "supports_parallel_tool_calls": able.parallel_tools is True,
            "context_window": able.max_input_tokens,
            "experimental_supported_tools": [],
            "input_modalities": ["text", "image"] if able.vision else ["text"],
        }

    def to_anthropic(self) -> dict[str, Any]:
        return {
            "type": "model",
            "id": self.name,
            "display_name": self.display_name,
            "created_at": rfc3339(self.created_at),
            "lifecycle": "active",
            "max_input_tokens": self.capabilities.max_input_tokens,
            "max_tokens": self.capabilities.max_output_tokens,
        }

    def _architecture(self) -> dict[str, Any]:
        able = self.capabilities
        read = ["text", *(modality for name, modality in _INPUT_MODALITIES.items() if getattr(able, name))]
        written = ["embeddings"] if self.embeds else ["text", "audio"] if able.audio_output else ["text"]
        return {
            "input_modalities": read,
            "output_modalities": written,
            "modality": f"{'+'.join(read)}->{'+'.join(written)}",
            "tokenizer": "Other",
            "instruct_type": None,
        }


def _parameters(able: Capabilities) -> list[str]:
    named = (names for capability, names in _PARAMETERS_OF.items() if getattr(able, capability))
    return [*_COMMON_PARAMETERS, *(name for names in named for name in names)]


def _pricing(price: Price) -> dict[str, str]:
    """Write the first tier's prices under OpenRouter's names."""
    rates = {
        "prompt": price.input_cost_per_token,
        "completion": price.output_cost_per_token,
        "input_cache_read": price.cache_read_input_token_cost,
        "input_cache_write": price.cache_creation_input_token_cost,
    }
    return {name: _plain_number(rate) for name, rate in rates.items() if rate is not None}


def _plain_number(value: float) -> str:
    """Write a number without an exponent, which not every client reads: 0.00000015."""
    return "0" if value == 0 else format(Decimal(repr(value)).normalize(), "f")


def _page(entries: Sequence[CatalogEntry], limit: int, before_id: str | None, after_id: str | None) -> dict[str, Any]:
    """Return one page of Anthropic's list.

    Raises:
        BadRequest: there is no such place in the list.
    """
    listed = [entry for entry in entries if not entry.embeds]
    if before_id is not None and after_id is not None:
        raise BadRequest("`before_id` and `after_id` are given both; send one of them", param="before_id")
    start, end = 0, len(listed)
    if after_id is not None:
        start = _place_of(after_id, listed, "after_id") + 1
    if before_id is not None:
        end = _place_of(before_id, listed, "before_id")
        start = max(0, end - limit)
    page = listed[start : min(end, start + limit)]
    return {
        "data": [entry.to_anthropic() for entry in page],
        "has_more": start > 0 if before_id is not None else start + limit < end,
        "first_id": page[0].name if page else None,
        "last_id": page[-1].name if page else None,
    }


def _place_of(name: str, entries: Sequence[CatalogEntry], param: str) -> int:
    for place, entry in enumerate(entries):
        if entry.name == name:
            return place
    raise BadRequest(f"`{param}` must be the id of a model of this list; got {name[:128]!r}", param=param)
