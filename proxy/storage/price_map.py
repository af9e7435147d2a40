from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

import orjson

from proxy.settings.effort import EFFORTS
from proxy.settings.model_config import EMBEDDING, with_flat_tiers
from router_core.errors import InvalidInput, InvalidPrice
from router_core.types import PRICE_FIELDS, Capabilities, Price, price_field

BUNDLED = "model_prices_and_context_window_backup.json"

SAMPLE_ENTRY = "sample_spec"

TEXT_MODES = frozenset({None, "chat", "completion", "responses"})

MAX_WINDOW = 10**12

# Providers whose zero price is a price. Elsewhere it stands for a trial, a subscription or "not known".
RUNS_LOCALLY = frozenset({"ollama", "ollama_chat", "lemonade", "lm_studio"})


class InvalidPriceMap(InvalidInput):
    """A document is not a price map; the message names the entry."""


# Those that every reasoning model has unless its entry says otherwise.
COMMON_EFFORTS = frozenset({"low", "medium", "high"})


@dataclass(frozen=True, slots=True)
class ThinkingSupport:
    """How a model is told to think."""

    efforts: tuple[str, ...] = ("low", "medium", "high")
    """Values of `reasoning_effort` that it knows, ascending."""
    adaptive: bool = False
    """Anthropic's `thinking` of type "adaptive"."""
    budgets: bool = True
    """Anthropic's `thinking` of type "enabled", with a budget of tokens."""
    always: bool = False
    """It cannot be told not to think."""


@dataclass(frozen=True, slots=True)
class PriceMapEntry:
    provider: str
    price: Price | None
    capabilities: Capabilities
    thinking: ThinkingSupport = ThinkingSupport()
    sampling: bool = True
    """Whether it accepts `temperature`, `top_p` and `top_k`."""
    output_config: bool = False
    """Whether it accepts `output_config.effort` of Anthropic's Messages."""
    system_turns: bool = False
    """Whether it accepts system turns among the others in Anthropic's Messages."""
    mode: str | None = None
    """What the model is for."""


class PriceMap:
    """Entries by LiteLLM's model name."""

    def __init__(self, entries: Mapping[str, PriceMapEntry]) -> None:
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[PriceMapEntry]:
        return iter(self._entries.values())

    def find(self, model: str) -> PriceMapEntry | None:
        """Return the entry of `provider/model`, or of its bare name if that is listed under the same provider."""
        if entry := self._entries.get(model):
            return entry
        provider, _, bare = model.partition("/")
        for name in _shorter(bare):
            entry = self._entries.get(name)
            if entry and _same_provider(provider, entry.provider):
                return entry
        return None


def parse_price_map(document: object) -> PriceMap:
    """Check the whole document, then read its models of text and of embeddings.

    Raises:
        InvalidPriceMap: one broken entry refuses the map, so that a damaged feed changes nothing.
    """
    if not isinstance(document, dict):
        raise InvalidPriceMap(f"a price map is a JSON object of models; got {type(document).__name__}")
    shared: dict[Any, Any] = {}
    entries = {
        name: _entry(name, listed, shared)
        for name, listed in document.items()
        if name != SAMPLE_ENTRY and _is_served(_checked(name, listed).get("mode"))
    }
    if not any(entry.price for entry in entries.values()):
        raise InvalidPriceMap("the price map states no price of any text model")
    return PriceMap(entries)


@lru_cache(maxsize=1)
def bundled_price_map() -> PriceMap:
    """Return the price map of the installed litellm."""
    spec = find_spec("litellm")
    if spec is None or not spec.submodule_search_locations:
        raise InvalidPriceMap("litellm is not installed, so its price map cannot be read")
    path = Path(spec.submodule_search_locations[0]) / BUNDLED
    return parse_price_map(orjson.loads(path.read_bytes()))


def _shorter(bare: str) -> Iterator[str]:
    """Yield the name, then the name without its first part, and so on, as of converse/us.anthropic.claude-…"""
    while bare:
        yield bare
        _, _, bare = bare.partition("/")


def _same_provider(asked: str, listed: str) -> bool:
    """Compare providers: vertex_ai also lists vertex_ai-language-models, and bedrock bedrock_converse."""
    return listed == asked or listed.startswith((f"{asked}-", f"{asked}_"))


def _is_served(mode: object) -> bool:
    return (mode is None or isinstance(mode, str)) and (mode in TEXT_MODES or mode == EMBEDDING)


def _checked(name: str, listed: object) -> dict[str, Any]:
    if not isinstance(listed, dict):
        raise InvalidPriceMap(f"{name}: an entry must be a JSON object; got {listed!r}")
    return listed


T = TypeVar("T")


def _entry(name: str, listed: dict[str, Any], shared: dict[Any, Any]) -> PriceMapEntry:
    """Read an entry. `shared`: the values of other entries, which this one has too where they are equal."""

    def same(value: T) -> T:
        return cast("T", shared.setdefault(value, value))

    provider = same(str(listed.get("litellm_provider") or name.partition("/")[0]))
    return PriceMapEntry(
        provider=provider,
        price=same(_price(name, listed, provider)),
        capabilities=same(_capabilities(listed)),
        thinking=same(_thinking(listed)),
        sampling=_ability(listed, "supports_sampling_params") is not False,
        output_config=_ability(listed, "supports_output_config") is True,
        system_turns=_ability(listed, "supports_mid_conversation_system") is True,
        mode=listed.get("mode"),
    )


def _capabilities(listed: dict[str, Any]) -> Capabilities:
    reads, answers = _modalities(listed, "supported_modalities"), _modalities(listed, "supported_output_modalities")
    largest_output = _limit(listed, "max_output_tokens")
    # max_tokens is the older name of either limit: of the output if that is known, else of the window.
    window = _limit(listed, "max_input_tokens") or (None if largest_output else _limit(listed, "max_tokens"))
    return Capabilities(
        max_input_tokens=window,
        max_output_tokens=largest_output,
        tools=_ability(listed, "supports_function_calling"),
        parallel_tools=_first_known(
            _ability(listed, "supports_parallel_function_calling"),
            _ability(listed, "supports_parallel_tool_use_config"),
        ),
        vision=_first_known(_ability(listed, "supports_vision"), reads("image")),
        video=_first_known(_ability(listed, "supports_video_input"), reads("video")),
        audio_input=_first_known(_ability(listed, "supports_audio_input"), reads("audio")),
        audio_output=_first_known(_ability(listed, "supports_audio_output"), answers("audio")),
        files=_ability(listed, "supports_pdf_input"),
        json_schema=_ability(listed, "supports_response_schema"),
        reasoning=_ability(listed, "supports_reasoning"),
    )


def _thinking(listed: dict[str, Any]) -> ThinkingSupport:
    levels = listed.get("reasoning_effort_levels")
    adaptive = _ability(listed, "supports_adaptive_thinking") is True
    return ThinkingSupport(
        efforts=tuple(
            effort
            for effort in EFFORTS
            if (effort in levels if isinstance(levels, list) else _knows_effort(listed, effort))
        ),
        adaptive=adaptive,
        budgets=not adaptive or _ability(listed, "supports_legacy_thinking") is True,
        always=_ability(listed, "thinking_always_on") is True,
    )


def _knows_effort(listed: dict[str, Any], effort: str) -> bool:
    stated = _ability(listed, f"supports_{effort}_reasoning_effort")
    return effort in COMMON_EFFORTS if stated is None else stated


def _price(name: str, listed: dict[str, Any], provider: str) -> Price | None:
    tiered = with_flat_tiers(listed)
    amounts = {field: _amount(name, tiered, field) for field in tiered if price_field(field)}
    if listed.get("mode") == EMBEDDING and amounts.get(PRICE_FIELDS[0]) is not None:
        amounts[PRICE_FIELDS[1]] = 0.0  # nothing is written
    base = [amounts.get(field) for field in PRICE_FIELDS[:2]]
    if None in base:
        return None
    if base == [0, 0] and (provider not in RUNS_LOCALLY or name.endswith("-cloud")):
        return None
    try:
        return Price.from_fields(amounts)
    except InvalidPrice as error:
        raise InvalidPriceMap(f"{name}: {error}") from error


def _amount(name: str, listed: Mapping[str, Any], field: str) -> float | None:
    value = listed.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidPriceMap(f"{name}: {field} must be a number of USD per token; got {value!r}")
    try:
        return float(value)
    except OverflowError as error:
        raise InvalidPriceMap(f"{name}: {field} is too large to be a number of USD per token") from error


def _limit(listed: dict[str, Any], field: str) -> int | None:
    """Return a context window; None if it is unknown. Some entries of the real map have a text here."""
    value = listed.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= MAX_WINDOW:
        return None
    return int(value)


def _ability(listed: dict[str, Any], field: str) -> bool | None:
    """Return whether a model can do something; None if it is unknown. The map seldom lists what a model cannot do."""
    value = listed.get(field)
    return value if isinstance(value, bool) else None


def _modalities(listed: dict[str, Any], field: str) -> Callable[[str], bool | None]:
    """Return a function that says whether a list of modalities names one; None if there is no list."""
    value = listed.get(field)
    return lambda modality: modality in value if isinstance(value, list) and value else None


def _first_known(*answers: bool | None) -> bool | None:
    return next((answer for answer in answers if answer is not None), None)
