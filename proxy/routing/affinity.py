"""Which model a conversation belongs to, and how a later request is recognised as its continuation.

A session id is not always sent, and models may not read the reasoning or the call ids of another. So the tool calls and
the reasoning of an answer leave fingerprints: digests that are the same whether the turn was sent whole or streamed,
and whether the client has written its JSON with other spaces.

What follows from it for a selection is decided by `selection.apply_affinity`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from typing import Any

from proxy.routing.chat_request import ChatRequest
from proxy.routing.requirements import TOOL_FIELDS
from proxy.routing.trajectory import NO_TRAJECTORY, Trajectory, read_trajectory
from proxy.settings.schema import Settings
from proxy.storage.client_keys import ClientKey
from proxy.storage.sessions import LastTurn, Lookup, SessionStore, scoped_key
from proxy.upstream.payload import iter_choices, simple_text
from router_core.types import frozen


@frozen
class Affinity:
    """What ties a conversation to a model."""

    scope: str = ""
    """The client key's id; empty if no key was needed."""
    session: str | None = field(default=None, repr=False)
    """What the session's newest answer is stored under; None: there is no session, sessions are off, or this answer is
    no turn of it."""
    has_reasoning: bool = False
    producer: str | None = None
    """The model whose tool calls are answered here, or whose reasoning is carried."""
    last_turn: LastTurn | None = None
    """The session's newest answer."""
    trajectory: Trajectory = NO_TRAJECTORY
    """How the run of the agent goes."""
    stuck: tuple[tuple[str, float], ...] = ()
    """The models that made turns in which the run was stuck, each with its share of `trajectory.stuck`."""

    def cached_prompt(self, settings: Settings) -> tuple[str, int] | None:
        """Return the model that has read this session a moment ago, and how many tokens of it."""
        last = self.last_turn
        if settings.sticky_sessions != "auto" or last is None or last.age_s > settings.prompt_cache_s:
            return None
        return (last.model, last.tokens) if last.tokens else None


NO_AFFINITY = Affinity()


async def load_affinity(
    sessions: SessionStore, request: ChatRequest, key: ClientKey | None, settings: Settings
) -> Affinity:
    """Look up whom a conversation belongs to. Never fails.

    Redis is asked only if the request has a session, or fingerprints that this process does not know.
    """
    scope = key.id if key else ""
    body = request.body
    plain = request.contents is not None and request.contents.plain_messages
    history = NO_HISTORY if plain else inspect_history(body["messages"])
    session = None if settings.sticky_sessions == "off" else _session_key(scope, request)
    trajectory = NO_TRAJECTORY
    if settings.trajectory == "auto" and not plain and not TOOL_FIELDS.isdisjoint(body):
        trajectory = read_trajectory(body["messages"])
    makers = _makers(scope, body["messages"], trajectory) if trajectory.stuck else ()
    if session is None and not history.fingerprints and not any(makers):
        if not (scope or history.has_reasoning or trajectory.turns):
            return NO_AFFINITY
        return Affinity(scope, None, history.has_reasoning, trajectory=trajectory)
    fingerprints = [scoped_key(scope, each) for each in history.fingerprints]
    found = await sessions.lookup(fingerprints, session, [each for each in makers if each])
    return Affinity(
        scope,
        session if request.housekeeping is None else None,
        history.has_reasoning,
        found.producer,
        found.last,
        trajectory,
        _stuck_models(trajectory, makers, found),
    )


def _makers(scope: str, messages: Sequence[Any], trajectory: Trajectory) -> tuple[str | None, ...]:
    """Return for each run of a trajectory what the model that made its newest turn is stored under; None: nothing."""
    found: list[str | None] = []
    for run in trajectory.runs:
        turn = TurnFingerprints()
        turn.add(messages[run.place])
        fingerprint = next(turn.of_calls(latest_user_text(messages, run.place)), None) if run.share else None
        found.append(None if fingerprint is None else scoped_key(scope, fingerprint))
    return tuple(found)


def _stuck_models(trajectory: Trajectory, makers: Sequence[str | None], found: Lookup) -> tuple[tuple[str, float], ...]:
    """Share out what is stuck among the models that made it. What nobody is known to have made counts for none."""
    shares: dict[str, float] = {}
    for run, fingerprint in zip(trajectory.runs, makers, strict=False):
        model = found.makers.get(fingerprint) if fingerprint else None
        if model is None and run.later <= 1:  # the session's newest answer was the end of it
            model = found.producer or (found.last.model if found.last else None)
        if model is not None and run.share:
            shares[model] = shares.get(model, 0.0) + trajectory.stuck * run.share
    return tuple(shares.items())


def _session_key(scope: str, request: ChatRequest) -> str | None:
    """Return what the conversation of one agent of a session is stored under; None: the request names no session."""
    name, agent = request.options.session, request.options.agent
    if name is None:
        return None
    return scoped_key(scope, f"session:{name}" if agent is None else f"session:{name}\n{agent}")


# Of one answer with `n`: a caller goes on with one of them.
MAX_CHOICES = 16


class AffinityRecorder:
    """Remember which model gave an answer, for the turns that continue it. One per request.

    Pass each chunk of a stream to `observe`, or a whole completion to `observe_completion`, and then `commit`.
    """

    def __init__(self, sessions: SessionStore, affinity: Affinity, messages: Sequence[Any]) -> None:
        self._sessions = sessions
        self._affinity = affinity
        self._messages = messages
        self._turns: dict[int, TurnFingerprints] = {}

    @property
    def producer(self) -> str | None:
        """Return what `Affinity.producer` is."""
        return self._affinity.producer

    def cached_prompt(self, settings: Settings) -> tuple[str, int] | None:
        """Return what `Affinity.cached_prompt` does."""
        return self._affinity.cached_prompt(settings)

    def observe(self, chunk: Mapping[str, Any], model: str) -> None:
        """Look at a chunk before it goes out: once its last piece is sent, the next turn may arrive anywhere."""
        if simple_text(chunk) is not None and not (self._turns and chunk["choices"][0].get("finish_reason")):
            return  # text leaves no fingerprint, and the answer has none yet, or goes on
        finished = False
        for place, choice in enumerate(iter_choices(chunk)):
            index = choice.get("index")
            for name in ("message", "delta"):
                if isinstance(part := choice.get(name), Mapping) and has_fingerprints(part):
                    self._add_to_turn(index if isinstance(index, int) else place, part)
            finished = finished or bool(choice.get("finish_reason"))
        if finished and self._turns:
            self._record_turns(model)

    def observe_completion(self, body: Mapping[str, Any], model: str) -> None:
        self.observe(body, model)
        if self._turns:
            self._record_turns(model)

    def commit(self, model: str, tokens: int | None) -> None:
        """Record the session's newest answer. `tokens`: prompt and answer together; None: not reported."""
        if self._affinity.session is not None:
            self._sessions.record([self._affinity.session], model, tokens)

    def _add_to_turn(self, index: int, part: Mapping[str, Any]) -> None:
        """Keep the fingerprints of the first choices that have any."""
        if index not in self._turns and len(self._turns) < MAX_CHOICES:
            self._turns[index] = TurnFingerprints()
        if (turn := self._turns.get(index)) is not None:
            turn.add(part)

    def _record_turns(self, model: str) -> None:
        """Record who made the calls and the reasoning of this answer."""
        turns = [turn for turn in self._turns.values() if not turn.is_empty]
        self._turns = {}
        if not turns:
            return
        question = latest_user_text(self._messages)
        found = [each for turn in turns for each in (*turn.of_reasoning(question), *turn.of_calls(question))]
        self._sessions.record([scoped_key(self._affinity.scope, each) for each in dict.fromkeys(found)], model)


_RESULT_ROLES = ("tool", "function")

_REASONING_FIELDS = frozenset({"reasoning_content", "reasoning", "reasoning_details", "thinking_blocks", "signature"})


@frozen
class ConversationHistory:
    """What earlier turns say of the model that produced them."""

    in_tool_loop: bool = False
    """The newest turns answer tool calls."""
    has_reasoning: bool = False
    """Some assistant turn carries reasoning, thinking or a signature of them."""
    fingerprints: tuple[str, ...] = ()
    """By which the model that produced them may be known, the surest first."""


NO_HISTORY = ConversationHistory()


def inspect_history(messages: Any) -> ConversationHistory:
    """Look through the messages of a request. Only the newest turns with calls and with reasoning are hashed."""
    if not isinstance(messages, list):
        return NO_HISTORY
    in_tool_loop = False
    newest = True
    fingerprints: list[str] = []
    for place in range(len(messages) - 1, -1, -1):
        message = messages[place]
        if not isinstance(message, (dict, Mapping)):  # most are a dict, which is faster to tell
            continue
        if message.get("role") != "assistant":
            in_tool_loop = in_tool_loop or (newest and _is_result(message))
            continue
        in_newest_loop, newest = newest and in_tool_loop, False
        turn = _turn_of(message, calls=in_newest_loop)
        if turn is None:
            continue
        question = latest_user_text(messages, place)
        fingerprints += turn.of_reasoning(question)
        if in_newest_loop:
            fingerprints += turn.of_calls(question)
        if turn.has_reasoning:
            return ConversationHistory(in_tool_loop, has_reasoning=True, fingerprints=_distinct(fingerprints))
    return ConversationHistory(in_tool_loop, fingerprints=_distinct(fingerprints))


def _is_result(message: Mapping[str, Any]) -> bool:
    """Whether a message holds a tool's result, as a turn of its own or as a part of the user's."""
    if message.get("role") in _RESULT_ROLES:
        return True
    content = message.get("content")
    return isinstance(content, list) and any(
        isinstance(part, Mapping) and part.get("type") == "tool_result" for part in content
    )


def _turn_of(message: Mapping[str, Any], *, calls: bool) -> TurnFingerprints | None:
    """Take the fingerprints of an earlier turn; None if it has none, which is quick to tell of most turns."""
    content = message.get("content")
    if not (calls or isinstance(content, list) or _has_reasoning(message)):
        return None
    turn = TurnFingerprints()
    turn.add(message)
    return turn if calls or turn.has_reasoning else None


def _has_reasoning(message: Mapping[str, Any]) -> bool:
    return not _REASONING_FIELDS.isdisjoint(message) and any(message.get(name) for name in _REASONING_FIELDS)


def _distinct(fingerprints: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(fingerprints))


# Characters of each end that are hashed, with the length: enough to tell two texts apart, however long they are.
SAMPLE_CHARS = 4096

# Of one turn: one that is recognised is enough.
MAX_CALLS = 32

# Of one list: the newest tell which turn it is.
MAX_PARTS = 2048

MIN_RANDOM_CHARS = 8

# A shorter name of a function may stand in a random id by chance, and makes none look random.
MIN_NAME_CHARS = 4

MIN_SIGNATURE_CHARS = 32

MIN_REASONING_CHARS = 200

_TEXTS = ("reasoning_content", "reasoning")

_BLOCKS = ("thinking_blocks", "reasoning_details", "content")

# Parts of `content` that are reasoning; in the other fields every block is.
_BLOCK_TYPES = ("thinking", "redacted_thinking", "reasoning")

_BLOCK_TEXTS = ("thinking", "text", "summary")

_BLOCK_SIGNATURES = ("signature", "data")

_FINGERPRINTED_FIELDS = frozenset({"tool_calls", "function_call", "signature", *_TEXTS, *_BLOCKS}) - {"content"}

# The index of the one `function_call` of a turn among its calls.
_FUNCTION_CALL = -1


class TextSample:
    """Keep both ends and the length of a text, in whatever pieces it comes."""

    __slots__ = ("_head", "_tail", "length")

    def __init__(self, text: str = "") -> None:
        self._head = self._tail = ""
        self.length = 0
        self.add(text)

    def add(self, text: str) -> None:
        if len(self._head) < SAMPLE_CHARS:
            self._head += text[: SAMPLE_CHARS - len(self._head)]
        self._tail = (self._tail + text[-SAMPLE_CHARS:])[-SAMPLE_CHARS:]
        self.length += len(text)

    @property
    def whole(self) -> str | None:
        """Return the text if it is short enough to have been kept, else None."""
        return self._head if self.length <= SAMPLE_CHARS else None

    @property
    def sample(self) -> tuple[str, str, str]:
        return self._head, self._tail, str(self.length)


class TurnFingerprints:
    """Take the fingerprints of one assistant turn, whole or in deltas."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._open: dict[int, _Call] = {}
        self._texts: dict[str, TextSample] = {}
        self._blocks: dict[str, _Block] = {}

    def add(self, part: Mapping[str, Any]) -> None:
        """Add a message, or one delta of a stream. One without `has_fingerprints` changes nothing."""
        for place, call in enumerate(_mappings(part.get("tool_calls"))):
            index = call.get("index")
            self._add_call(index if isinstance(index, int) else place, call.get("id"), call.get("function"))
        if isinstance(part.get("function_call"), Mapping):
            self._add_call(_FUNCTION_CALL, None, part["function_call"])
        for name in _TEXTS:
            if isinstance(text := part.get(name), str) and text:
                self._texts.setdefault(name, TextSample()).add(text)
        for name in _BLOCKS:
            for block in _mappings(part.get(name)):
                self._add_block(name, block)
        if isinstance(part.get("signature"), str):
            self._block("signature").add({"signature": part["signature"]})

    @property
    def has_reasoning(self) -> bool:
        return bool(self._texts or self._blocks)

    @property
    def is_empty(self) -> bool:
        return not (self._calls or self.has_reasoning)

    def of_reasoning(self, question: TextSample) -> Iterator[str]:
        """Yield the fingerprints of reasoning, the surest first.

        Args:
            question: the newest user turn before this one, which tells short texts apart.
        """
        blocks = self._blocks.values()
        for signature in (block.signature for block in blocks if block.signature.length):
            yield _fingerprint("signature", signature, question, short=MIN_SIGNATURE_CHARS)
        for text in (*(block.text for block in blocks if block.text.length), *self._texts.values()):
            yield _fingerprint("reasoning", text, question, short=MIN_REASONING_CHARS)

    def of_calls(self, question: TextSample) -> Iterator[str]:
        for call in self._calls:
            if (found := call.fingerprint(question)) is not None:
                yield found

    def _add_call(self, index: int, call_id: Any, function: Any) -> None:
        stated = call_id if isinstance(call_id, str) else ""
        call = self._open.get(index)
        if call is None or (stated and call.id and stated != call.id):
            if len(self._calls) >= MAX_CALLS:
                return
            call = self._open[index] = _Call()
            self._calls.append(call)
        call.id = call.id or stated
        if isinstance(function, Mapping):
            call.add(function)

    def _add_block(self, name: str, block: Mapping[str, Any]) -> None:
        kind = block.get("type")
        if name == "content" and kind == "tool_use":
            self._add_call(len(self._calls), block.get("id"), {"name": block.get("name"), "arguments": None})
        elif name != "content" or kind in _BLOCK_TYPES:
            self._block(name).add(block)

    def _block(self, name: str) -> _Block:
        return self._blocks.setdefault(name, _Block())


class _Call:
    """A tool call of an assistant."""

    __slots__ = ("_arguments", "_is_text", "_name", "id")

    def __init__(self) -> None:
        self.id = ""
        self._name = ""
        self._arguments = TextSample()
        self._is_text = True

    def add(self, function: Mapping[str, Any]) -> None:
        name, arguments = function.get("name"), function.get("arguments", "")
        if isinstance(name, str):
            self._name = self._name or name[:SAMPLE_CHARS]
        if isinstance(arguments, str):
            self._arguments.add(arguments)
        else:
            self._is_text = False

    def fingerprint(self, question: TextSample) -> str | None:
        """Take it of the id alone if that is unique; otherwise of the function, its arguments and the question too.

        Servers that count (call_0, functions.x:0) give every conversation the same ids. None: it cannot be told apart.
        """
        if looks_random(self.id, self._name):
            return _digest("call", *TextSample(self.id).sample)
        if not self._is_text:
            return None
        called = (*TextSample(self.id).sample, self._name, *_canonical(self._arguments))
        return _digest("counted", *called, *question.sample)


class _Block:
    """The last block of reasoning in one field."""

    __slots__ = ("_index", "signature", "text")

    def __init__(self) -> None:
        self._begin(None)

    def add(self, block: Mapping[str, Any]) -> None:
        """Add a block, or a piece of one: text after a signature, or another index, begins the next."""
        index = block.get("index")
        text = "".join(_text(block.get(name)) for name in _BLOCK_TEXTS)
        if (text and self.signature.length) or (index is not None and index != self._index):
            self._begin(index)
        self.text.add(text)
        for name in _BLOCK_SIGNATURES:
            self.signature.add(_text(block.get(name)))

    def _begin(self, index: Any) -> None:
        self._index = index
        self.text, self.signature = TextSample(), TextSample()


def has_fingerprints(part: Mapping[str, Any]) -> bool:
    """Whether a message or a delta may leave a fingerprint. Plain text as `content` leaves none."""
    return isinstance(part.get("content"), list) or not _FINGERPRINTED_FIELDS.isdisjoint(part)


def latest_user_text(messages: Sequence[Any], before: int | None = None) -> TextSample:
    """Return the text of the newest user turn among `messages[:before]`."""
    for place in range(len(messages) if before is None else before, 0, -1):
        message = messages[place - 1]
        if isinstance(message, (dict, Mapping)) and message.get("role") == "user":
            return _sample_of(message.get("content"))
    return TextSample()


def looks_random(call_id: str, name: str = "") -> bool:
    """Whether no other call will have this id.

    That is so if some word of it, other than the function's name, has MIN_RANDOM_CHARS or more characters, of which
    letters and digits alternate as in random ones.
    """
    rest = call_id[:SAMPLE_CHARS].replace(name, " ") if len(name) >= MIN_NAME_CHARS else call_id[:SAMPLE_CHARS]
    long_words = re.findall(rf"[A-Za-z0-9]{{{MIN_RANDOM_CHARS},}}", rest)
    return any(len(re.findall(r"[0-9]+|[A-Za-z]+", word)) > 2 for word in long_words)


def _sample_of(content: Any) -> TextSample:
    if isinstance(content, str):
        return TextSample(content)
    question = TextSample()
    for part in _mappings(content):
        question.add(_text(part.get("text")))
    return question


def _canonical(arguments: TextSample) -> tuple[str, ...]:
    """Return arguments in one form: clients parse them and write them again, with other spaces."""
    text = arguments.whole
    if text is None:
        return arguments.sample
    try:
        return (json.dumps(json.loads(text or "{}"), sort_keys=True),)
    except (ValueError, RecursionError):
        return (text,)


def _text(value: Any) -> str:
    """Return the text of a field that holds a text, or a list of parts with texts."""
    if isinstance(value, str):
        return value
    return "".join(part["text"] for part in _mappings(value) if isinstance(part.get("text"), str))


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value[-MAX_PARTS:] if isinstance(item, Mapping)] if isinstance(value, list) else []


def _fingerprint(kind: str, text: TextSample, question: TextSample, *, short: int) -> str:
    return _digest(kind, *text.sample, *(question.sample if text.length < short else ()))


def _digest(*texts: str) -> str:
    """Hash texts with SHA-256, as JSON: no two lists are written alike, and half characters can be written."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
