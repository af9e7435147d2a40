"""OpenAI's legacy text completions (`POST /v1/completions`), answered by chat models.

| field | what becomes of it |
|---|---|
| `prompt` | the text of one user message; several prompts, and tokens in place of text, are refused |
| `suffix` | told to the model in words: it is to write the text between `prompt` and `suffix` |
| `max_tokens` | passed on; without it there is no limit, where OpenAI's own default is 16 tokens |
| `logprobs` | `logprobs` and `top_logprobs` of a chat request, and back into the legacy lists |
| `best_of` | left out if nothing is to be selected (it equals `n`), else refused |
| `echo` | refused if true |
| `tools` and other fields of chat requests whose answer is no text | left out |
| any other | passed on under its name, as in a chat request; null states nothing |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from proxy.errors import BadRequest
from proxy.routing.chat_request import OWN_FIELDS, without_own_fields
from proxy.server.api.translation import APIName, RelayedEvents
from proxy.storage.usage import combine_usage, usage_of
from proxy.upstream.payload import iter_choices
from proxy.upstream.sse import DONE, KEEP_ALIVE, format_event
from proxy.upstream.text_frame import TextFrame, TextRun

# What is translated here, and not passed on under its name.
_TRANSLATED = frozenset({"prompt", "suffix", "echo", "best_of", "logprobs", "top_logprobs"})

# Of chat requests: their answers have no place in a text completion.
_ANSWERED_IN_CHAT = frozenset("tools tool_choice parallel_tool_calls functions function_call modalities audio".split())

# As chat requests allow them; the legacy API allows 5.
MAX_TOP_LOGPROBS = 20

_FILL_THE_GAP = (
    "Write the text that is missing between the two parts below. Answer with the missing text alone, as it is to be"
    " inserted: no explanation, no quotation marks, no code fence, and nothing of the two parts."
)

_FINISH_REASONS = {"length": "length", "max_tokens": "length", "content_filter": "content_filter"}


def translate(document: Mapping[str, Any], *, answer_id: str, created_at: int) -> TextCompletionsTranslation:
    """Translate the body of a text completion.

    Args:
        document: the client's body.
        answer_id: of which the id of the answer is made.
        created_at: Unix seconds.

    Raises:
        BadRequest: naming the client's field.
    """
    if "messages" in document:
        raise BadRequest(
            "`messages` is a field of /v1/chat/completions; a text completion has a `prompt`", param="messages"
        )
    _refuse_unsupported(document)
    passed_on = {
        name: value
        for name, value in document.items()
        if (value is not None or name in OWN_FIELDS) and name not in _TRANSLATED and name not in _ANSWERED_IN_CHAT
    }
    top_logprobs = _top_logprobs(document)
    logprobs: dict[str, Any] = {} if top_logprobs is None else {"logprobs": True}
    if top_logprobs:
        logprobs["top_logprobs"] = top_logprobs
    return TextCompletionsTranslation(
        document=without_own_fields(document),
        body={**passed_on, "messages": [{"role": "user", "content": _user_text(document)}], **logprobs},
        left_out=tuple(name for name in document if name in _ANSWERED_IN_CHAT and document[name]),
        id=f"cmpl-{answer_id}",
        created_at=created_at,
        include_usage=_asks_for_usage(document),
        top_logprobs=top_logprobs,
    )


def _refuse_unsupported(document: Mapping[str, Any]) -> None:
    echo, best_of, answers = document.get("echo"), document.get("best_of"), document.get("n")
    if echo is not None and echo is not False:
        raise BadRequest("`echo` is not served: a chat model does not repeat its prompt; leave it out", param="echo")
    if best_of is not None and (isinstance(best_of, bool) or best_of != (1 if answers is None else answers)):
        raise BadRequest(
            "`best_of` must equal `n` or be left out: which answer is the best cannot be told here; ask for all of them"
            " with `n`",
            param="best_of",
        )


def _user_text(document: Mapping[str, Any]) -> str:
    prompt, suffix = _prompt(document.get("prompt")), document.get("suffix")
    if not isinstance(suffix, str | None):
        raise BadRequest("`suffix` must be a text", param="suffix")
    if not suffix:
        return prompt
    # One user message, so that a model's own system prompt stays in force.
    return f"{_FILL_THE_GAP}\n\n<before>\n{prompt}\n</before>\n\n<after>\n{suffix}\n</after>"


def _prompt(prompt: object) -> str:
    """Return the text of a prompt. Raises BadRequest."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise BadRequest("`prompt` must be a text, or a list with one text", param="prompt")
    if any(isinstance(each, int | list) for each in prompt):
        raise BadRequest(
            "`prompt` must be text: tokens mean something else to each model, and cannot be routed", param="prompt"
        )
    if len(prompt) > 1:
        raise BadRequest(
            f"`prompt` holds {len(prompt)} prompts; one is served in a request: send one request for each",
            param="prompt",
        )
    if not isinstance(prompt[0], str):
        raise BadRequest("`prompt` must be a text, or a list with one text", param="prompt")
    return prompt[0]


def _top_logprobs(document: Mapping[str, Any]) -> int | None:
    """Return how many likely tokens are asked for beside each token of the answer; None: no log probabilities."""
    count = document.get("logprobs")
    if count is None:
        return None
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_TOP_LOGPROBS:
        raise BadRequest(
            f"`logprobs` must be a whole number from 0 to {MAX_TOP_LOGPROBS}; got {count!r}"[:200], param="logprobs"
        )
    return count


def _asks_for_usage(document: Mapping[str, Any]) -> bool:
    options = document.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, Mapping):
        raise BadRequest("`stream_options` must be an object", param="stream_options")
    if not isinstance(options.get("include_usage"), bool | None):
        name = "stream_options.include_usage"
        raise BadRequest(f"`{name}` must be true or false", param=name)
    return options.get("include_usage") is True


@dataclass(slots=True)
class TextCompletionsTranslation:
    """One text completion as a chat request, and its answer as a text completion."""

    document: Mapping[str, Any]
    body: Mapping[str, Any]
    left_out: tuple[str, ...]
    id: str
    created_at: int
    include_usage: bool
    """The client asked for the usage chunk of a stream."""
    top_logprobs: int | None
    """None: no log probabilities were asked for."""
    api: APIName = "completions"
    stored: bool = False

    def answer(self, completion: Mapping[str, Any], model: str) -> dict[str, Any]:
        choices = [
            {
                "text": _text_of(choice.get("message")),
                "index": _index(choice, place),
                "logprobs": LegacyLogprobs(self.top_logprobs).add(choice.get("logprobs")),
                "finish_reason": _finish_reason(choice.get("finish_reason")) or "stop",
            }
            for place, choice in enumerate(iter_choices(completion))
        ]
        usage = completion.get("usage")
        return {**self.envelope(completion, model, choices), **({"usage": usage} if usage else {})}

    def stream(self, model: str) -> TextCompletionsStream:
        return TextCompletionsStream(self, model)

    def fail_relayed(self, seen: RelayedEvents, error: Mapping[str, Any], status: int) -> bytes:  # noqa: ARG002
        return format_event({"error": error})

    def envelope(self, source: Mapping[str, Any], model: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return an answer or a chunk with these choices. `source`: what it is made of."""
        fingerprint = source.get("system_fingerprint")
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created_at,
            "model": model,
            "choices": choices,
            **({"system_fingerprint": fingerprint} if fingerprint else {}),
        }


class TextCompletionsStream:
    """Turn the chunks of a chat model into chunks of text completions."""

    def __init__(self, translation: TextCompletionsTranslation, model: str) -> None:
        self.keep_alive = KEEP_ALIVE
        self.answer: Mapping[str, Any] | None = None
        self._translation = translation
        self._model = model
        self._usage: Any = None
        # By the index of their choice, for offsets count from the start of its text.
        self._logprobs: dict[int, LegacyLogprobs] = {}
        # The newest frame, and what stands around the text of its events.
        self._frame: TextFrame | None = None
        self._around = (b"", b"")

    def write(self, chunk: Mapping[str, Any]) -> bytes:
        if usage := usage_of(chunk):
            self._usage = combine_usage(self._usage, usage)
        choices = list(self._choices(chunk))
        return self._event(chunk, choices) if choices else b""

    def write_run(self, run: TextRun) -> bytes | None:
        if not run.frame.is_plain:
            return None
        if self._frame is not run.frame:
            choice = {"text": "", "index": 0, "logprobs": None, "finish_reason": None}
            # Quotes within a string are escaped, so that this is no part of another member's value.
            before, text, after = self._event(run.frame.body, [choice]).partition(b'"text":"')
            self._frame, self._around = run.frame, (before + text, after)
        return run.framed(*self._around)

    def finish(self) -> bytes:
        if not self._translation.include_usage or self._usage is None:
            return DONE
        return format_event({**self._translation.envelope({}, self._model, []), "usage": self._usage}) + DONE

    def fail(self, error: Mapping[str, Any], status: int) -> bytes:  # noqa: ARG002
        return format_event({"error": error})

    def _event(self, chunk: Mapping[str, Any], choices: list[dict[str, Any]]) -> bytes:
        event = self._translation.envelope(chunk, self._model, choices)
        return format_event({**event, "usage": None} if self._translation.include_usage else event)

    def _choices(self, chunk: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the choices that have text, log probabilities or an end."""
        for place, choice in enumerate(iter_choices(chunk)):
            index, text = _index(choice, place), _text_of(choice.get("delta"))
            if index not in self._logprobs:
                self._logprobs[index] = LegacyLogprobs(self._translation.top_logprobs)
            logprobs = self._logprobs[index].add(choice.get("logprobs"))
            finish_reason = _finish_reason(choice.get("finish_reason"))
            if text or logprobs or finish_reason:
                yield {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish_reason}


class LegacyLogprobs:
    """Turn the log probabilities of one chat answer, whole or in pieces, into the legacy API's four lists.

    Args:
        top: how many likely tokens were asked for beside each; None: no log probabilities were.
    """

    def __init__(self, top: int | None) -> None:
        self._top = top
        # Characters of the answer before the next token.
        self._offset = 0

    def add(self, logprobs: object) -> dict[str, Any] | None:
        """Return the lists of the next tokens; None if there are none."""
        listed = logprobs.get("content") if isinstance(logprobs, Mapping) else None
        tokens = [each for each in listed if _is_token(each)] if isinstance(listed, list) else []
        if self._top is None or not tokens:
            return None
        offsets = []
        for each in tokens:
            offsets.append(self._offset)
            self._offset += len(each["token"])
        return {
            "tokens": [each["token"] for each in tokens],
            "token_logprobs": [each.get("logprob") for each in tokens],
            "top_logprobs": [_likely_tokens(each) for each in tokens] if self._top else None,
            "text_offset": offsets,
        }


def _is_token(value: object) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("token"), str)


def _likely_tokens(token: Mapping[str, Any]) -> dict[str, Any]:
    """Return token → log probability of the likely tokens at one place, the one that was written among them."""
    listed = token.get("top_logprobs")
    likely = [each for each in listed if _is_token(each)] if isinstance(listed, list) else []
    return {each["token"]: each.get("logprob") for each in (*likely, token)}


def _index(choice: Mapping[str, Any], place: int) -> int:
    index = choice.get("index")
    return index if type(index) is int else place


def _text_of(part: object) -> str:
    """Return the text of a message or a delta; a refusal is what the model says, too."""
    if not isinstance(part, Mapping):
        return ""
    content = part.get("content")
    if isinstance(content, list):
        texts = (each.get("text") for each in content if isinstance(each, Mapping) and each.get("type") == "text")
        content = "".join(text for text in texts if isinstance(text, str))
    refusal = part.get("refusal")
    return content if isinstance(content, str) and content else refusal if isinstance(refusal, str) else ""


def _finish_reason(reason: object) -> str | None:
    """Return the legacy API's reason; None while the answer goes on."""
    return _FINISH_REASONS.get(str(reason), "stop") if reason else None
