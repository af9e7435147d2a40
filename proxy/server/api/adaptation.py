"""A chat body that was translated from another API, as the model that was chosen can take it.

A client of Anthropic's or OpenAI's newer API states what only some models understand, and does not know which model
will answer. What the chosen one would refuse is taken out here, or said in its words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proxy.settings.effort import EFFORTS, MIN_BUDGET, USUAL_TOKENS, budget_within
from proxy.settings.litellm_params import PASSTHROUGH, is_openai_url, stated_address
from proxy.storage.price_map import PriceMapEntry, ThinkingSupport, bundled_price_map
from proxy.storage.records import ModelRecord
from proxy.upstream.native_body import as_user_content, goes_on_without_thinking

# Providers beside Anthropic that serve Claude, and for which litellm writes Anthropic's own fields.
SERVE_CLAUDE = frozenset({"bedrock", "bedrock_converse", "vertex_ai", "vertex_ai_beta", "azure_ai", "databricks"})

# Those that are sent a body of Anthropic's own format, with whatever else stands in ours.
ANTHROPIC_FORMAT = frozenset({"anthropic", "vertex_ai", "azure_ai"})

# Providers for which litellm translates `reasoning_effort` for every model that reasons. Elsewhere it refuses it.
READ_EFFORT = frozenset(
    """
    openai azure openrouter groq xai mistral deepseek fireworks_ai together_ai moonshot dashscope cerebras deepinfra
    gemini vertex_ai wandb databricks hosted_vllm ollama ollama_chat oci
    """.split()
)

# The same of `parallel_tool_calls`.
READ_PARALLEL = frozenset(
    """
    openai azure azure_ai openrouter groq xai mistral deepseek fireworks_ai together_ai moonshot dashscope gemini
    vertex_ai minimax hosted_vllm huggingface
    """.split()
)

# Providers that read `top_k` beside OpenAI's fields.
READ_TOP_K = frozenset({"openrouter", "together_ai", "fireworks_ai", "hosted_vllm"})

# Providers whose models are sent the reasoning of earlier turns. Others refuse messages with members that they do not
# know, or ignore it.
READ_REASONING = frozenset(
    {"deepseek", "moonshot", "openrouter", "dashscope", "fireworks_ai", "together_ai", "zai", "minimax", "hosted_vllm"}
)

# OpenAI's limits.
MAX_USER_CHARS = 64
MAX_STOPS = 4

Body = Mapping[str, Any]


def adapt(body: Body, record: ModelRecord, *, reads_reasoning: bool = True) -> tuple[Body, tuple[str, ...]]:
    """Return a translated chat body as a model can take it, and which fields were left out.

    Args:
        reads_reasoning: whether the model may be able to read what earlier answers have signed.

    Returns:
        The same object if nothing had to change. Messages that did not change are shared.
    """
    upstream = _upstream_of(record)
    changes = _Changes(body)
    if body.get("metadata") is not None and body.get("store") is not True:
        changes.remove("metadata", quietly=True)  # read here, for the session; OpenAI refuses it with nothing to store
    if not reads_reasoning:
        _leave_out_signed(changes)
    _adapt_sampling(changes, upstream)
    _adapt_options(changes, upstream)
    if upstream.reads_thinking:
        _adapt_claude(changes, upstream)
    else:
        _adapt_effort(changes, upstream)
    _adapt_contents(changes, upstream)
    return changes.result()


@dataclass(frozen=True, slots=True)
class _Upstream:
    """What is known of who serves a model."""

    provider: str
    model: str
    relayed: bool
    """The body goes there as it is, and not through litellm."""
    own_server: bool
    """A server of OpenAI's format at a configured address: these ignore what they do not read."""
    claude: bool
    reasons: bool
    max_output_tokens: int | None
    entry: PriceMapEntry | None

    @property
    def is_openai(self) -> bool:
        return self.provider in ("openai", "azure") and not self.own_server

    @property
    def reads_effort(self) -> bool:
        by_litellm = self.provider in READ_EFFORT and (self.provider != "vertex_ai" or "gemini" in self.model)
        return self.relayed or by_litellm

    @property
    def reads_thinking(self) -> bool:
        served = self.provider == "anthropic" or self.provider in SERVE_CLAUDE or self.provider == "openrouter"
        return self.claude and served and not self.relayed

    @property
    def reads_top_k(self) -> bool:
        """Whether it reads `top_k` beside OpenAI's fields. Bedrock's has another place."""
        return self.provider in READ_TOP_K or (self.reads_thinking and self.provider in ANTHROPIC_FORMAT)

    @property
    def reads_cache_control(self) -> bool:
        return self.reads_thinking or (self.claude and self.provider == "openrouter")

    @property
    def thinking(self) -> ThinkingSupport:
        return ThinkingSupport() if self.entry is None else self.entry.thinking


def _upstream_of(record: ModelRecord) -> _Upstream:
    name = str(record.litellm_params["model"])
    resolved = record.resolved
    provider = name.partition("/")[0] if resolved is None else resolved.provider
    entry = bundled_price_map().find(name)
    address = stated_address(record.litellm_params)
    reasons, largest = record.info.supports_reasoning, record.info.max_output_tokens
    if entry is not None:
        reasons = entry.capabilities.reasoning if reasons is None else reasons
        largest = entry.capabilities.max_output_tokens if largest is None else largest
    return _Upstream(
        provider=provider,
        model=name.lower(),
        relayed=resolved is not None and resolved.mode == "relay",
        own_server=provider in PASSTHROUGH and bool(address) and not is_openai_url(address or ""),
        claude=provider == "anthropic" or "claude" in name.lower(),
        reasons=reasons is True,
        max_output_tokens=largest,
        entry=entry,
    )


class _Changes:
    """A body with changes, which is copied at the first of them."""

    def __init__(self, body: Body) -> None:
        self._body = body
        self._changed: dict[str, Any] | None = None
        self._left_out: list[str] = []

    def get(self, name: str) -> Any:
        return (self._body if self._changed is None else self._changed).get(name)

    def set(self, name: str, value: Any) -> None:
        if self._changed is None:
            self._changed = dict(self._body)
        self._changed[name] = value

    def remove(self, name: str, *, quietly: bool = False) -> None:
        """Take out a field if it is there. `quietly`: nothing that the client asked for is lost."""
        if name not in (self._body if self._changed is None else self._changed):
            return
        if self._changed is None:
            self._changed = dict(self._body)
        del self._changed[name]
        if not quietly:
            self.report(name)

    def report(self, name: str) -> None:
        if name not in self._left_out:
            self._left_out.append(name)

    def result(self) -> tuple[Body, tuple[str, ...]]:
        return self._body if self._changed is None else self._changed, tuple(self._left_out)


def _leave_out_signed(changes: _Changes) -> None:
    messages = changes.get("messages")
    unsigned = [_without(message, "thinking_blocks", "reasoning_details") for message in messages]
    if any(new is not old for new, old in zip(unsigned, messages, strict=True)):
        changes.set("messages", unsigned)


def _adapt_sampling(changes: _Changes, upstream: _Upstream) -> None:
    """Take out what models that always reason refuse. They accept a temperature of 1, and so do all others."""
    fixed = (upstream.entry is not None and not upstream.entry.sampling) or (upstream.is_openai and upstream.reasons)
    if fixed:
        for name in ("temperature", "top_p"):
            if changes.get(name) is not None:
                changes.remove(name, quietly=changes.get(name) == 1)
    if fixed or not (upstream.own_server or upstream.reads_top_k):
        changes.remove("top_k")


def _adapt_options(changes: _Changes, upstream: _Upstream) -> None:
    if not upstream.is_openai:
        changes.remove("service_tier")
    if not (upstream.relayed or upstream.reads_thinking or upstream.provider in READ_PARALLEL):
        changes.remove("parallel_tool_calls")
    if not (upstream.reads_thinking and upstream.provider in ANTHROPIC_FORMAT):
        changes.remove("cache_control")
    user = changes.get("user")
    if isinstance(user, str) and len(user) > MAX_USER_CHARS and not upstream.reads_thinking:
        changes.remove("user", quietly=True)
    stop = changes.get("stop")
    if stop is not None and upstream.is_openai:
        if upstream.reasons:
            changes.remove("stop")
        elif isinstance(stop, list) and len(stop) > MAX_STOPS:
            changes.set("stop", stop[:MAX_STOPS])
            changes.report(f"stop[{MAX_STOPS}:]")


def _adapt_effort(changes: _Changes, upstream: _Upstream) -> None:
    """Say in `reasoning_effort` alone how much is to be thought, in words that the model knows."""
    effort = changes.get("reasoning_effort")
    thinking = changes.get("thinking")
    known = upstream.thinking.efforts if upstream.reasons and upstream.reads_effort else ()
    nearest = _nearest(effort, known) if isinstance(effort, str) else None
    if nearest is None:
        changes.remove("reasoning_effort", quietly=effort == "none" or thinking is not None)
    elif nearest != effort:
        changes.set("reasoning_effort", nearest)
    if thinking is not None:
        wanted = isinstance(thinking, Mapping) and thinking.get("type") not in ("disabled", None)
        changes.remove("thinking", quietly=not wanted or upstream.reasons)


def _nearest(effort: str, known: Sequence[str]) -> str | None:
    """Return the known effort that is nearest to this one, the smaller of two; None: there is none.

    Whoever asks for some thinking is not given none.
    """
    if effort not in EFFORTS:
        return None
    place = EFFORTS.index(effort)
    usable = known if effort == "none" else [each for each in known if each != "none"]
    return min(usable, key=lambda each: (abs(EFFORTS.index(each) - place), EFFORTS.index(each)), default=None)


def _adapt_claude(changes: _Changes, upstream: _Upstream) -> None:
    """Say what Claude is to think as this version of it is told: with an effort, or with a budget of tokens."""
    thinking, effort = changes.get("thinking"), changes.get("reasoning_effort")
    support = upstream.thinking
    stated = thinking.get("type") if isinstance(thinking, Mapping) else None
    if effort == "none":
        changes.remove("reasoning_effort", quietly=True)
        effort = None
    if stated == "disabled" and support.always:
        changes.remove("thinking")
    elif stated == "enabled" and not support.budgets:
        changes.set("thinking", {"type": "adaptive", "display": thinking.get("display") or "summarized"})
    elif stated in ("adaptive", "between_tools") and upstream.entry is not None and not support.adaptive:
        changes.set("thinking", {"type": "enabled", "budget_tokens": USUAL_TOKENS.get(effort or "high", MIN_BUDGET)})
    _fit_budget(changes, upstream)
    if effort is not None and upstream.entry is not None:
        if not support.adaptive:
            changes.remove("reasoning_effort", quietly=stated is not None)
        elif (nearest := _nearest(effort, support.efforts)) != effort:
            changes.set("reasoning_effort", nearest)


def _fit_budget(changes: _Changes, upstream: _Upstream) -> None:
    """Make a budget less than the limit of the answer, or take it out where Anthropic would refuse it."""
    thinking = changes.get("thinking")
    if not isinstance(thinking, Mapping) or thinking.get("type") != "enabled":
        return
    limits = [changes.get("max_tokens"), changes.get("max_completion_tokens"), upstream.max_output_tokens]
    limit = min((limit for limit in limits if isinstance(limit, int)), default=None)
    budget = thinking.get("budget_tokens")
    fitting = budget_within(max(budget, MIN_BUDGET) if isinstance(budget, int) else MIN_BUDGET, limit)
    if fitting is None or goes_on_without_thinking(changes.get("messages")):
        changes.remove("thinking")
    elif isinstance(budget, int) and budget != fitting:
        changes.set("thinking", {**thinking, "budget_tokens": fitting})


def _adapt_contents(changes: _Changes, upstream: _Upstream) -> None:
    keeps_reasoning = upstream.own_server or upstream.reads_thinking or upstream.provider in READ_REASONING
    contents = _Contents(upstream, keeps_reasoning=keeps_reasoning)
    messages = changes.get("messages")
    adapted = contents.messages(messages)
    if adapted is not messages:
        changes.set("messages", adapted)
    tools = changes.get("tools")
    if not upstream.reads_cache_control and isinstance(tools, list) and any("cache_control" in tool for tool in tools):
        changes.set("tools", [_without(tool, "cache_control") for tool in tools])
        contents.lost_cache_control = True
    if contents.lost_cache_control:
        changes.report("cache_control")


def _without(item: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    return item if item.keys().isdisjoint(names) else {name: item[name] for name in item if name not in names}


class _Contents:
    """Adapts messages, and shares those that need no change."""

    def __init__(self, upstream: _Upstream, *, keeps_reasoning: bool) -> None:
        self._keeps_cache_control = upstream.reads_cache_control
        self._on_parts_alone = upstream.reads_cache_control and upstream.relayed
        self._keeps_system = upstream.is_openai
        # Anthropic fetches files itself, from an address that litellm takes as their id. As data, it would fetch them.
        self._fetches_files = upstream.reads_thinking
        reads = {
            "thinking_blocks": upstream.reads_thinking,
            "reasoning_content": keeps_reasoning,
            "reasoning_details": keeps_reasoning and upstream.provider == "openrouter",
        }
        self._unread = tuple(name for name, is_read in reads.items() if not is_read)
        self.lost_cache_control = False

    def messages(self, messages: list[Any]) -> list[Any]:
        """Return the same list if nothing changes."""
        turns: list[list[Any]] = []
        changed = follows_told = False
        for place, message in enumerate(messages):
            new = self._message(message)
            told = place > 0 and not self._keeps_system and new.get("role") == "system"
            if told:
                new = {"role": "user", "content": as_user_content(new["content"])}
            changed = changed or new is not message
            # Some servers accept turns in alternation only.
            if (told or follows_told) and new.get("role") == "user" and turns[-1][0].get("role") == "user":
                turns[-1].append(new)
            else:
                turns.append([new])
            follows_told = told
        return [_joined(turn) for turn in turns] if changed else messages

    def _message(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        new = _without(message, *self._unread)
        if not self._keeps_cache_control or self._on_parts_alone:
            new = self._without_cache_control(new)
        content = new.get("content")
        if not isinstance(content, list):
            return new
        if self._fetches_files and any(_is_remote_file(part) for part in content):
            new = {**new, "content": [_by_id(part) if _is_remote_file(part) else part for part in content]}
        if self._keeps_cache_control:
            return new
        parts = [_without(part, "cache_control") for part in content]
        if any(part is not old for part, old in zip(parts, content, strict=True)):
            self.lost_cache_control = True
        if all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
            between = "" if new.get("role") == "assistant" else "\n\n"
            return {**new, "content": between.join(part["text"] for part in parts)}
        return {**new, "content": parts}

    def _without_cache_control(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """Take marks from a message itself and from its calls."""
        new = _without(message, "cache_control")
        calls = new.get("tool_calls")
        if isinstance(calls, list) and any("cache_control" in call for call in calls):
            new = {**new, "tool_calls": [_without(call, "cache_control") for call in calls]}
        self.lost_cache_control = self.lost_cache_control or new is not message
        return new


def _is_remote_file(part: Mapping[str, Any]) -> bool:
    file = part.get("file")
    data = file.get("file_data") if isinstance(file, Mapping) else None
    return isinstance(data, str) and data.startswith(("http://", "https://"))


def _by_id(part: Mapping[str, Any]) -> dict[str, Any]:
    return {**part, "file": {"file_id": part["file"]["file_data"]}}


def _joined(turn: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return messages of one role as one."""
    if len(turn) == 1:
        return turn[0]
    contents: list[Any] = [message.get("content") for message in turn]
    if all(isinstance(content, str) for content in contents):
        return {**turn[0], "content": "\n\n".join(contents)}
    lists = [[{"type": "text", "text": each}] if isinstance(each, str) else (each or []) for each in contents]
    return {**turn[0], "content": [part for parts in lists for part in parts]}
