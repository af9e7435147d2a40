"""The body of a request in Anthropic's Messages or OpenAI's Responses, for one model that speaks that API.

It is the client's own, less what the chosen model or its provider would refuse: clients write for the model that they
name, and another may have been chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from proxy.settings.effort import EFFORTS, MIN_BUDGET, SAMPLING, USUAL_TOKENS, Effort, budget_within
from proxy.settings.litellm_params import is_provider_param
from proxy.settings.model_config import NativeAPI
from proxy.storage.price_map import PriceMapEntry, ThinkingSupport, bundled_price_map
from proxy.storage.records import ModelRecord
from proxy.upstream.native_api import BODY_PARAMS, OWN_REASONING_PREFIX, OWN_SIGNATURE_PREFIX, reaches_anthropic

Body = dict[str, Any]

ENCRYPTED_REASONING = "reasoning.encrypted_content"

_LIMIT_NAMES: Mapping[NativeAPI, str] = {"messages": "max_tokens", "responses": "max_output_tokens"}

# What a budget says of the effort, for models that take no budget.
_MIN_BUDGETS = {"xhigh": 32000, "high": 10000, "medium": 4000}

# Claude Code's first block of `system`, for Anthropic's accounting.
_BILLING_PREFIX = "x-anthropic-billing-header:"

_THINKING_BLOCKS = ("thinking", "redacted_thinking")

# Items whose ids say which reasoning belongs to them. Nothing else needs the ids.
_ITEMS_AFTER_REASONING = ("message", "function_call", "custom_tool_call")


@dataclass(frozen=True)
class Support:
    """What a model takes. Of what is not known of it, the client's fields are sent as they are."""

    reasons: bool | None
    """None: not known."""
    entry: PriceMapEntry | None
    """Of LiteLLM's price map; None: the model is not listed."""
    reads_reasoning: bool = True
    """Whether what earlier answers carry may be its own, so that it can verify or decrypt it."""

    @property
    def thinking(self) -> ThinkingSupport | None:
        return None if self.entry is None else self.entry.thinking

    def can_read(self, proof: Any, own_prefix: str) -> bool:
        """Return whether a signature or encrypted reasoning may be the provider's own."""
        is_theirs = isinstance(proof, str) and proof != "" and not proof.startswith(own_prefix)
        return is_theirs and self.reads_reasoning and self.reasons is not False

    def nearest_effort(self, effort: str) -> str:
        """Return the strongest effort up to this one that the model takes, or else its weakest.

        Reasoning is switched off for those alone who ask for that.
        """
        known = EFFORTS if self.thinking is None else self.thinking.efforts
        if effort not in EFFORTS or effort in known:
            return effort
        usable = [each for each in known if each != "none"]
        weaker = [each for each in usable if EFFORTS.index(each) < EFFORTS.index(effort)]
        return (*reversed(weaker), *usable, effort)[0]


def support_of(record: ModelRecord) -> Support:
    """Look up what a model is known to take. `model_info` counts more than the price map, which lists what it can."""
    entry = bundled_price_map().find(str(record.litellm_params["model"]))
    reasons = record.info.supports_reasoning
    if reasons is None and entry is not None:
        reasons = entry.capabilities.reasoning is True
    return Support(reasons, entry)


def native_body(
    api: NativeAPI,
    document: Mapping[str, Any],
    record: ModelRecord,
    *,
    max_output_tokens: int | None = None,
    reads_reasoning: bool = True,
) -> Body:
    """Return what a model is sent in its own API, but for `model` and `stream`.

    Args:
        document: the client's body, without UniRoute's own fields. It is not changed.
        max_output_tokens: an upper bound of the answer's tokens. None: the client's own holds.
        reads_reasoning: whether the model may be able to read the reasoning of earlier answers.
    """
    if record.effort is not None:
        document = _with_effort(api, document, record.effort)
    body = _with_model_params(api, document, record) if record.has_body_params else dict(document)
    if max_output_tokens is not None:
        name = _LIMIT_NAMES[api]
        stated = body.get(name)
        is_smaller = isinstance(stated, int) and not isinstance(stated, bool) and stated <= max_output_tokens
        body[name] = stated if is_smaller else max_output_tokens
    support = support_of(record)
    if not reads_reasoning:
        support = replace(support, reads_reasoning=False)
    return _messages_body(body, record, support) if api == "messages" else _responses_body(body, support)


def _with_model_params(api: NativeAPI, document: Mapping[str, Any], record: ModelRecord) -> Body:
    """Add the parameters that the model fixes and the client does not state."""
    body = dict(document)
    for name, value in record.litellm_params.items():
        theirs = BODY_PARAMS[api].get(name)
        if theirs is None or value is None or is_provider_param(name) or _states(api, document, theirs):
            continue
        if name == "reasoning_effort":
            body |= _fixed_effort(api, str(value))
        elif name == "stop":
            body[theirs] = [value] if isinstance(value, str) else value
        else:
            body[theirs] = value
    if (system := record.litellm_params.get("system")) and not _has_system(document):
        body["system" if api == "messages" else "instructions"] = system
    return body


def _with_effort(api: NativeAPI, document: Mapping[str, Any], effort: Effort) -> Body:
    """Ask for the effort that was chosen, in place of what the client stated: that was its upper bound."""
    body = dict(document)
    if api == "responses":
        stated = body.get("reasoning")
        body["reasoning"] = {**(stated if isinstance(stated, Mapping) else {}), "effort": effort}
        return body
    stated, config = body.get("thinking"), body.get("output_config")
    shown = {"display": stated["display"]} if isinstance(stated, Mapping) and "display" in stated else {}
    config = {name: value for name, value in config.items() if name != "effort"} if isinstance(config, Mapping) else {}
    choice = body.get("tool_choice")
    if isinstance(choice, Mapping) and choice.get("type") in ("any", "tool"):
        thinking: Body = {"type": "disabled"}  # Anthropic refuses to think where a tool is demanded
    elif isinstance(effort, int):
        thinking = {"type": "enabled", "budget_tokens": effort, **shown}
    else:
        fixed = _fixed_effort(api, effort)
        thinking, config = {**fixed["thinking"], **shown}, {**config, **fixed.get("output_config", {})}
    if thinking["type"] == "disabled":
        thinking.pop("display", None)
    else:  # and to sample as the client might ask it to
        body = {name: value for name, value in body.items() if name not in SAMPLING}
    body["thinking"] = thinking
    _set_member(body, "output_config", config)
    return body


def _states(api: NativeAPI, document: Mapping[str, Any], name: str) -> bool:
    """Return whether the client states a field, or another that says the same."""
    names = ("thinking", "output_config") if api == "messages" and name in ("thinking", "output_config") else (name,)
    return any(document.get(each) is not None for each in names)


def _fixed_effort(api: NativeAPI, effort: str) -> Body:
    if api == "responses":
        return {"reasoning": {"effort": effort}}
    if effort == "none":
        return {"thinking": {"type": "disabled"}}
    effort = "low" if effort == "minimal" else effort
    return {"thinking": {"type": "adaptive"}, "output_config": {"effort": effort}}


def _has_system(document: Mapping[str, Any]) -> bool:
    turns = document.get("messages") or document.get("input")
    return bool(document.get("system") or document.get("instructions")) or any(
        turn.get("role") in ("system", "developer") for turn in _mappings(turns)
    )


# Anthropic's Messages.


def _messages_body(body: Body, record: ModelRecord, support: Support) -> Body:
    if not reaches_anthropic(record) and "system" in body:
        _set_member(body, "system", _without_billing(body["system"]))
    if isinstance(messages := body.get("messages"), list):
        body["messages"] = list(_readable_turns(messages, support))
    _adapt_thinking(body, support)
    if support.entry is not None and not support.entry.sampling:
        for name in SAMPLING:
            body.pop(name, None)
    return body


def _without_billing(system: Any) -> Any:
    if isinstance(system, str):
        return "" if system.startswith(_BILLING_PREFIX) else system
    if not isinstance(system, list):
        return system
    return [block for block in system if not _is_billing(block)]


def _is_billing(block: Any) -> bool:
    text = block.get("text") if isinstance(block, Mapping) else None
    return isinstance(text, str) and text.startswith(_BILLING_PREFIX)


def _adapt_thinking(body: Body, support: Support) -> None:
    """Ask for thinking in the way that the model knows, as much of it as the client asked for."""
    config = body.get("output_config")
    effort = config.get("effort") if isinstance(config, Mapping) else None
    stated = thinking = body.get("thinking")
    if isinstance(stated, Mapping):
        thinking, effort = _adapted(stated, effort, support)
        thinking = _allowed(thinking, body)
    if support.reasons is False:
        thinking = effort = None
    if support.entry is not None and not support.entry.output_config:
        effort = None
    _set_member(body, "thinking", thinking)
    _set_effort(body, support.nearest_effort(effort) if isinstance(effort, str) else effort)
    if not thinking and (stated or support.reasons is False):
        _drop_thinking_edits(body)


def _adapted(thinking: Mapping[str, Any], effort: Any, support: Support) -> tuple[Body | None, Any]:
    """Return `thinking` and the effort in the way that the model knows."""
    kind, known = thinking.get("type"), support.thinking
    shown = {"display": thinking["display"]} if "display" in thinking else {}
    if known is None or (kind == "disabled" and not known.always):
        return dict(thinking), effort
    if kind == "disabled":
        return None, effort
    if kind == "enabled" and not known.budgets:
        return {"type": "adaptive", **shown}, effort or _effort_of(thinking.get("budget_tokens"))
    if kind != "enabled" and not known.adaptive:
        return {
            "type": "enabled",
            "budget_tokens": USUAL_TOKENS.get(str(effort or "high"), MIN_BUDGET),
            **shown,
        }, effort
    return dict(thinking), effort


def _effort_of(budget: Any) -> str:
    if not isinstance(budget, int):
        return "high"
    return next((effort for effort, least in _MIN_BUDGETS.items() if budget >= least), "low")


def _allowed(thinking: Body | None, body: Body) -> Body | None:
    """Keep a budget below the limit of the whole answer. None: thinking with a budget would be refused."""
    if thinking is None or thinking.get("type") != "enabled":
        return thinking
    if goes_on_without_thinking(body.get("messages")):
        return None
    budget, limit = thinking.get("budget_tokens"), body.get("max_tokens")
    if not isinstance(budget, int) or not isinstance(limit, int):
        return thinking
    within = budget_within(budget, limit)
    return None if within is None else {**thinking, "budget_tokens": within}


def goes_on_without_thinking(turns: object) -> bool:
    """Whether the newest assistant turn, of Messages or of a chat, calls tools without thinking, as other models do.

    Anthropic refuses a budget for thinking there: until the assistant ends its turn, it goes on as it began.
    """
    newest: Body = next((turn for turn in reversed(_mappings(turns)) if turn.get("role") == "assistant"), {})
    if newest.get("tool_calls"):
        return not newest.get("thinking_blocks")
    kinds = [block.get("type") for block in _mappings(newest.get("content"))]
    return "tool_use" in kinds and kinds[0] not in _THINKING_BLOCKS


def _set_effort(body: Body, effort: Any) -> None:
    config = body.get("output_config")
    if not isinstance(config, Mapping | None):
        return
    kept = {name: value for name, value in (config or {}).items() if name != "effort"}
    if effort is not None:
        kept["effort"] = effort
    if config is None or kept != config:
        _set_member(body, "output_config", kept)


def _set_member(body: Body, name: str, value: Any) -> None:
    """Set a member, or leave it out if there is nothing in it."""
    if value:
        body[name] = value
    else:
        body.pop(name, None)


def _drop_thinking_edits(body: Body) -> None:
    """Leave out the edits of thinking: they are refused where there is no thinking."""
    management = body.get("context_management")
    edits = management.get("edits") if isinstance(management, Mapping) else None
    if not isinstance(management, Mapping) or not isinstance(edits, list):
        return
    kept = [edit for edit in edits if not (isinstance(edit, Mapping) and _is_thinking_edit(edit))]
    if len(kept) < len(edits):
        _set_member(body, "context_management", {**management, "edits": kept} if kept else None)


def _is_thinking_edit(edit: Mapping[str, Any]) -> bool:
    return str(edit.get("type")).startswith("clear_thinking")


def _readable_turns(turns: list[Any], support: Support) -> Iterator[Any]:
    """Yield the turns without thinking that the provider cannot read, and under roles that the model knows."""
    for turn in turns:
        if not isinstance(turn, Mapping):
            yield turn
            continue
        if turn.get("role") == "system" and support.entry is not None and not support.entry.system_turns:
            said = turn.get("content")
            blocks = [{"type": "text", "text": said}] if isinstance(said, str) else said
            turn = {"role": "user", "content": as_user_content(blocks)}
        content = turn.get("content")
        if turn.get("role") == "assistant" and isinstance(content, list):
            kept = [block for block in content if not _is_unreadable(block, support)]
            if not kept and content:
                continue
            turn = turn if len(kept) == len(content) else {**turn, "content": kept}
        yield turn


def as_user_content(content: Any) -> Any:
    """Return the content of a system turn as a user's, in which a model sees that the user did not write it."""
    if isinstance(content, str):
        return _tagged(content)
    if not isinstance(content, list):
        return content
    return [
        {**part, "text": _tagged(part["text"])} if isinstance(part, Mapping) and "text" in part else part
        for part in content
    ]


def _tagged(text: object) -> str:
    return f"<system>\n{text}\n</system>"


def _is_unreadable(block: Any, support: Support) -> bool:
    if not isinstance(block, Mapping) or block.get("type") not in _THINKING_BLOCKS:
        return False
    signature = block.get("signature") if block.get("type") == "thinking" else block.get("data")
    return not support.can_read(signature, OWN_SIGNATURE_PREFIX)


# OpenAI's Responses.


def _responses_body(body: Body, support: Support) -> Body:
    """Nothing is stored at the provider: what a request continues was put into its `input` before."""
    was_stored = body.get("store") is not False
    body["store"] = False
    for name in ("previous_response_id", "conversation", "background"):
        body.pop(name, None)
    _include_reasoning(body, support, even_if_not_asked=was_stored)
    _adapt_effort(body, support)
    if isinstance(body.get("input"), list):
        body["input"] = list(_readable_items(body["input"], support))
    return body


def _include_reasoning(body: Body, support: Support, *, even_if_not_asked: bool) -> None:
    """Ask for encrypted reasoning, which a model without any refuses to send."""
    include = body.get("include") or []
    if not isinstance(include, list):
        return
    if support.reasons is False:
        include = [each for each in include if each != ENCRYPTED_REASONING]
    elif even_if_not_asked and support.reasons and ENCRYPTED_REASONING not in include:
        include = [*include, ENCRYPTED_REASONING]
    _set_member(body, "include", include)


def _adapt_effort(body: Body, support: Support) -> None:
    reasoning = body.get("reasoning")
    if not isinstance(reasoning, Mapping):
        return
    if support.reasons is False:
        del body["reasoning"]
    elif isinstance(effort := reasoning.get("effort"), str):
        body["reasoning"] = {**reasoning, "effort": support.nearest_effort(effort)}


def _readable_items(items: list[Any], support: Support) -> Iterator[Any]:
    """Yield the items that the provider can read without anything that it had stored."""
    kept = [item for item in items if not _is_foreign(item, support)]
    if len(kept) == len(items):
        yield from items
        return
    for item in kept:
        # By these ids the provider would miss the reasoning that is left out.
        if isinstance(item, Mapping) and item.get("type", "message") in _ITEMS_AFTER_REASONING and "id" in item:
            item = {name: value for name, value in item.items() if name != "id"}
        yield item


def _is_foreign(item: Any, support: Support) -> bool:
    if not isinstance(item, Mapping):
        return False
    if item.get("type") == "item_reference":
        return True
    if item.get("type") != "reasoning":
        return False
    return not support.can_read(item.get("encrypted_content"), OWN_REASONING_PREFIX)


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []
