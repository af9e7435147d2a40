"""The bytes of a stream in OpenAI's format to blocks of chunks: what one reading held. Reads from nobody."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping
from typing import Any

from proxy.errors import LONGEST_WORDS, UpstreamFailure
from proxy.relay.sse import MAX_EVENT_BYTES, ErrorData, EventCutter, EventTooLong, RawLine, loads
from proxy.upstream.answers import Joined, chunks_of_completion, form_of, has_choices
from proxy.upstream.failures import MAY_TELL, error_in, no_completion, reported
from proxy.upstream.payload import Payload, exact, exactly, parsed

Parse = Callable[[bytes], tuple[Any, bytes | None]]
"""An event's data to JSON, and its bytes where they may be shown as they are."""

_DONE = b"[DONE]"
_ODD_CHOICES = "the model sent a chunk whose `choices` are not a list of objects"
_NO_JSON = "the model sent an event that is not JSON"
_REPORTED = "the model reported an error within its stream"
MOST_CHOICES = 1024
"""Of one answer. OpenAI's `n` is 128 at most."""
_LONGEST_REST = 16 * 2**10
"""Bytes that are kept of what is neither events nor a completion."""
LAST_WORDS_S = 5.0
"""How long more is waited for, usage for example, once every choice has ended."""


def answers_of(body: Mapping[str, Any]) -> int:
    """How many a request asks for."""
    stated = body.get("n")
    return stated if type(stated) is int and stated > 1 else 1


class ChoiceEnds:
    """Which choices of an answer have begun, and which of them have ended."""

    def __init__(self) -> None:
        self._begun: set[int] = set()
        self._ended: set[int] = set()

    def see(self, choices: list[Any]) -> None:
        """Raises UpstreamFailure where there are more than anybody asks for."""
        for place, choice in enumerate(choices):
            index = choice.get("index")
            if type(index) is not int:
                index = place
            if index not in self._begun:
                self._begun.add(index)
                if len(self._begun) > MOST_CHOICES:
                    raise UpstreamFailure(f"the model's answer has more than {MOST_CHOICES} choices")
            if choice.get("finish_reason"):
                self._ended.add(index)

    @property
    def begun(self) -> bool:
        return bool(self._begun)

    def all(self, least: int = 1) -> bool:
        """Whether all that began have ended, and so many at least."""
        return len(self._ended) == len(self._begun) >= least


class ChunkReader:
    """Feed it what was read; it gives the chunks of each whole event, until the stream is `over`.

    A body that is one JSON value becomes the chunks of it, whatever its headers called it.
    """

    def __init__(self, parse: Parse = parsed, *, answers: int = 1, headers: Mapping[str, str] | None = None) -> None:
        """`answers`: how many the caller asked for (`n`). `headers`: of the response."""
        self._cutter = EventCutter()
        self._parse = parse
        self._answers = answers
        self._headers = headers
        self._ends = ChoiceEnds()
        self._head: bytes | None = b""
        """What came before the first byte that says what this is. None: it is known."""
        self._json: list[bytes] | None = None
        """Of a body that is JSON, all that came."""
        self._json_size = 0
        self._other: bytes | None = None
        """The beginning of a body that is neither JSON nor events."""
        self._told_done = False
        self.begun = False
        """A chunk has come."""
        self.over = False
        """Nothing more is to be read."""
        self.failure: UpstreamFailure | None = None
        """What ended it, after the chunks before."""

    @property
    def finished(self) -> bool:
        """The answer has come to its end: of every choice, or [DONE] after something."""
        return (self._told_done and self._ends.begun) or self._ends.all()

    def feed(self, piece: bytes) -> list[Payload]:
        if self._head is not None:
            return self._begin(self._head + piece)
        if self._json is not None:
            return self._go_on_with_json(piece)
        return self._events(piece)

    def close(self) -> list[Payload]:
        """Nothing more comes."""
        block: list[Payload] = []
        if self._head:
            block = self._events(self._head)
        if self._json is not None:
            block = self._of_whole_json(b"".join(self._json))
        if not self.over:
            finished = self.finished
            block += self._block(self._cutter.close())
            if finished and self.failure is not None and self.failure.message == _NO_JSON:
                self.failure = None  # half an event, where the connection broke behind the end of the answer
        self.over = True
        return block

    def break_off(self) -> bool:
        """The connection broke. Whether the answer had ended before, so that this does not matter."""
        self.over = self._ends.all(self._answers)
        return self.over

    @property
    def fault(self) -> UpstreamFailure | None:
        """Of a stream that is over: what was wrong with how it ended."""
        if self.failure is not None or self.finished:
            return self.failure
        if self._other and not self.begun:
            return no_completion("the model", self._other, self._headers)
        return UpstreamFailure("the model's stream ended before its answer did")

    def _begin(self, head: bytes) -> list[Payload]:
        """Once it is known what this is."""
        form = form_of(head)
        if form is None:
            self._head = head[-_LONGEST_REST:]
            return []
        self._head = None
        if form == "json":
            self._json = []
            return self._go_on_with_json(head.removeprefix(codecs.BOM_UTF8).lstrip())
        if form == "other":
            self._other = b""
        return self._events(head)

    def _go_on_with_json(self, piece: bytes) -> list[Payload]:
        assert self._json is not None  # who calls has looked
        before, self._json_size = self._json_size, self._json_size + len(piece)
        if self._json_size > MAX_EVENT_BYTES:
            return self._fail(UpstreamFailure("the model's stream broke: EventTooLong"))
        self._json.append(piece)
        if before < _LONGEST_REST and b"\n" in piece:
            said = b"".join(self._json)
            if _is_of_a_stream(said.partition(b"\n")[0]):
                self._json = None
                return self._events(said)
        return []

    def _of_whole_json(self, said: bytes) -> list[Payload]:
        """A completion in place of a stream, or an error."""
        self._json = None
        try:
            completion = self._parse(said)[0]
        except ValueError:  # it only began like JSON
            self._other = b""
            return self._events(said)
        self.over = True
        if not isinstance(completion, dict) or error_in(completion) is not None or not has_choices(completion):
            return self._fail(no_completion("the model", completion, self._headers))
        chunks = chunks_of_completion(exactly(said, completion))
        for chunk in chunks:
            self._ends.see(chunk["choices"])
        self.begun = True
        return [Payload(chunk) for chunk in chunks]

    def _events(self, piece: bytes) -> list[Payload]:
        if self._other is not None and len(self._other) < _LONGEST_REST:
            self._other = (self._other + piece)[:_LONGEST_REST]
        try:
            return self._block(self._cutter.feed(piece))
        except EventTooLong as error:
            return self._fail(UpstreamFailure(f"the model's stream broke: {type(error).__name__}"))

    def _block(self, events: list[bytes]) -> list[Payload]:
        block: list[Payload] = []
        for event in events:
            try:
                self._add(event, block)
            except UpstreamFailure as failure:
                self._fail(failure)
            if self.over:
                break
        return block

    def _add(self, event: bytes, block: list[Payload]) -> None:
        """Raises UpstreamFailure."""
        data = event.strip()
        if type(event) is ErrorData:
            raise reported(_REPORTED, _error_of(data), self._headers)
        if not data or (type(event) is RawLine and not _is_of_a_stream(data)):
            return
        if data == _DONE:
            self._told_done = self.over = True
            return
        try:
            said, raw = self._parse(data)
        except ValueError as error:
            self._add_lines(data.split(b"\n"), block, error)
            return
        chunk = _chunk(said, raw, data, self._headers)
        block.append(chunk)
        self.begun = True
        self._ends.see(chunk.body["choices"])

    def _add_lines(self, lines: list[bytes], block: list[Payload], error: ValueError) -> None:
        """Events of some servers, with no blank line between them."""
        if len(lines) == 1:
            raise UpstreamFailure(_NO_JSON) from error
        for line in lines:
            if not self.over:
                self._add(line, block)

    def _fail(self, failure: UpstreamFailure) -> list[Payload]:
        self.failure, self.over = failure, True
        return []


class CompletionReader:
    """Feed it the body of an answer that is to be no stream; a stream of events is put together all the same."""

    def __init__(
        self, model: str, parse: Parse = parsed, *, answers: int = 1, headers: Mapping[str, str] | None = None
    ) -> None:
        """As ChunkReader."""
        self._model = model
        self._parse = parse
        self._answers = answers
        self._headers = headers
        self._pieces: list[bytes] = []
        self._is_known = False
        """Whether it is JSON or events."""
        self._events: ChunkReader | None = None
        self._joined = Joined()

    @property
    def finished(self) -> bool:
        """The answer has come to its end, as far as that shows before the end of the body."""
        return self._events is not None and self._events.finished

    @property
    def over(self) -> bool:
        """Nothing more is to be read."""
        return self._events is not None and self._events.over

    def feed(self, piece: bytes) -> None:
        if self._events is not None:
            self._join(self._events.feed(piece))
            return
        self._pieces.append(piece)
        if self._is_known:
            return
        head = b"".join(self._pieces)
        form = form_of(head)
        if form is None:
            self._pieces = [head[-_LONGEST_REST:]]
            return
        self._is_known = True
        if form == "events":
            self._events = ChunkReader(exact, answers=self._answers, headers=self._headers)
            self._pieces = []
            self._join(self._events.feed(head))

    def break_off(self) -> bool:
        """The connection broke. Whether the answer had ended before."""
        return self._events is not None and self._events.break_off()

    def completion(self) -> Payload:
        """Once all has come. Raises UpstreamFailure."""
        if self._events is not None:
            return self._put_together(self._events)
        said = b"".join(self._pieces)
        try:
            completion, data = self._parse(said.removeprefix(codecs.BOM_UTF8))
        except ValueError:  # it may only have begun like JSON
            events = ChunkReader(exact, answers=self._answers, headers=self._headers)
            self._join(events.feed(said))
            self._join(events.close())
            if events.failure is None and not events.begun:
                raise no_completion(self._model, said, self._headers) from None
            return self._put_together(events)
        return completion_of(self._model, completion, data, self._headers)

    def _put_together(self, events: ChunkReader) -> Payload:
        if not events.over:
            self._join(events.close())
        if (fault := events.fault) is not None:
            raise fault
        return Payload(self._joined.completion())

    def _join(self, block: list[Payload]) -> None:
        for chunk in block:
            self._joined.add(chunk.body)


def completion_of(model: str, said: Any, raw: bytes | None, headers: Mapping[str, str] | None = None) -> Payload:
    """Raises UpstreamFailure: it is none, or tells of an error."""
    if not isinstance(said, dict) or error_in(said) is not None or not has_choices(said):
        raise no_completion(model, said, headers)
    if not said.get("usage"):
        for choice in said["choices"]:
            if isinstance(choice.get("usage"), dict):
                whole = said if raw is None else exactly(raw, said)
                return Payload({**whole, "usage": choice["usage"]})
    return Payload(said, raw)


def _is_of_a_stream(line: bytes) -> bool:
    """Whether a line of JSON alone is an error or a chunk, which belongs into an event."""
    try:
        said = loads(line)
    except ValueError:
        return False
    return isinstance(said, dict) and (error_in(said) is not None or ("choices" in said and not has_choices(said)))


def _error_of(data: bytes) -> Any:
    """What an event that is called an error says."""
    try:
        said = loads(data)
    except ValueError:
        return {"error": data.decode("utf-8", "replace")[:LONGEST_WORDS]}
    return said if error_in(said) is not None else {"error": said}


def chunk_of(data: bytes, parse: Parse = parsed) -> Payload:
    """Raises UpstreamFailure. No choices and no delta, which some servers say as null, become what clients expect."""
    try:
        said, raw = parse(data)
    except ValueError as error:
        raise UpstreamFailure(_NO_JSON) from error
    return _chunk(said, raw, data)


def _chunk(said: Any, raw: bytes | None, data: bytes, headers: Mapping[str, str] | None = None) -> Payload:
    if not isinstance(said, dict):
        raise UpstreamFailure("the model sent an event that is not a JSON object")
    odd = said.get("object") == "error" or not MAY_TELL.isdisjoint(said)
    choices = said.get("choices")
    if not isinstance(choices, list | None):
        _raise_if_error(said, headers)
        raise UpstreamFailure(_ODD_CHOICES)
    usual = choices is not None
    for choice in choices or ():
        if not isinstance(choice, dict):
            _raise_if_error(said, headers)
            raise UpstreamFailure(_ODD_CHOICES)
        odd = odd or "error" in choice or bool(choice.get("finish_reason"))
        usual = usual and choice.get("delta") is not None and "usage" not in choice
    if odd:
        _raise_if_error(said, headers)
    if not usual or b"\n" in data or b"\r" in data:  # an event is one line here
        return Payload(_filled(exactly(data, said)))
    return Payload(said, raw)


def _raise_if_error(said: dict[str, Any], headers: Mapping[str, str] | None) -> None:
    error = error_in(said)
    if error is not None:
        raise reported(_REPORTED, error, headers)


def _filled(chunk: dict[str, Any]) -> dict[str, Any]:
    if chunk.get("choices") is None:
        chunk["choices"] = []
    for choice in chunk["choices"]:
        if choice.get("delta") is None:
            choice["delta"] = {}
        if isinstance(choice.get("usage"), dict) and not chunk.get("usage"):  # Moonshot's place for it
            chunk["usage"] = choice["usage"]
    return chunk


def is_finished(chunk: Mapping[str, Any]) -> bool:
    for choice in chunk.get("choices") or ():  # noqa: SIM110  # any() over a generator takes three times as long
        if choice.get("finish_reason"):
            return True
    return False
