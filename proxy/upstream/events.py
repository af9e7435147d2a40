"""The bytes of a stream in OpenAI's format to blocks of chunks: what one reading held. Reads from nobody."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from proxy.errors import MOST_ERROR_BYTES, AnswerTooLarge, NoRoomForAnswer, UpstreamFailure
from proxy.json_shape import SMALL, TooMuchJson
from proxy.relay.sse import EventCutter, EventTooLong
from proxy.upstream.answer_room import AnswerRoom, Held
from proxy.upstream.payload import Payload, exactly, parsed

Parse = Callable[[bytes], tuple[Any, bytes | None]]
"""An event's data to JSON, and its bytes where they may be shown as they are."""

_DONE = b"[DONE]"
_ODD_CHOICES = "the model sent a chunk whose `choices` are not a list of objects"


class ChunkReader:
    """Feed it what was read; it gives the chunks of each whole event, until the stream is `over`."""

    def __init__(self, parse: Parse = parsed, room: AnswerRoom | None = None) -> None:
        self._room = room or AnswerRoom()
        self._held = Held(self._room)
        self._cutter = EventCutter(self._room.largest)
        self._parse = parse
        self.begun = False
        """A chunk has come."""
        self.finished = False
        """The answer has come to its end: a finish_reason, or [DONE] after something."""
        self.over = False
        """Nothing more is to be read."""
        self.failure: UpstreamFailure | None = None
        """What ended it, after the chunks before."""

    def feed(self, piece: bytes) -> list[Payload]:
        try:
            cutter = self._cutter
            events = cutter.feed(piece)
            if cutter.size > SMALL or self._held.size:
                self._hold(cutter.size)
        except EventTooLong as error:
            return self._fail(AnswerTooLarge(f"{error} (max_answer_bytes)"))
        except NoRoomForAnswer as failure:
            return self._fail(failure)
        return self._block(events)

    def close(self) -> list[Payload]:
        """Nothing more comes."""
        block = self._block(self._cutter.close())
        self.over = True
        self.drop()
        return block

    def drop(self) -> None:
        """What it holds of an event that is not over."""
        self._held.release()

    @property
    def fault(self) -> UpstreamFailure | None:
        """Of a stream that is over: what was wrong with how it ended."""
        if self.failure is None and not self.finished:
            return UpstreamFailure("the model's stream ended before its answer did")
        return self.failure

    def _hold(self, size: int) -> None:
        """Of the event that is not over."""
        if size <= self._held.size:
            self._held.release()
        if size > SMALL:
            self._held.grow_to(size)

    def _block(self, events: list[bytes]) -> list[Payload]:
        block: list[Payload] = []
        for event in events:
            data = event.strip()
            if not data:
                continue
            if data == _DONE:
                self.finished, self.over = self.begun, True
                break
            try:
                chunk = chunk_of(data, self._parse)
                if len(data) > SMALL:
                    chunk.held = Held(self._room, len(data))
            except UpstreamFailure as failure:
                self._fail(failure)
                break
            block.append(chunk)
            self.begun = True
            self.finished = self.finished or is_finished(chunk.body)
        return block

    def _fail(self, failure: UpstreamFailure) -> list[Payload]:
        self.failure, self.over = failure, True
        self.drop()
        return []


def chunk_of(data: bytes, parse: Parse = parsed) -> Payload:
    """Raises UpstreamFailure. No choices and no delta, which some servers say as null, become what clients expect."""
    try:
        chunk, raw = parse(data)
    except TooMuchJson as error:
        raise AnswerTooLarge(f"the model sent an event that {error}") from error
    except ValueError as error:
        raise UpstreamFailure("the model sent an event that is not JSON") from error
    if not isinstance(chunk, dict):
        raise UpstreamFailure("the model sent an event that is not a JSON object")
    if chunk.get("error"):
        said = chunk if len(data) <= MOST_ERROR_BYTES else data
        raise UpstreamFailure("the model reported an error within its stream", status=502, body=said)
    choices = chunk.get("choices")
    if not isinstance(choices, list | None):
        raise UpstreamFailure(_ODD_CHOICES)
    whole = choices is not None
    for choice in choices or ():
        if not isinstance(choice, dict):
            raise UpstreamFailure(_ODD_CHOICES)
        whole = whole and choice.get("delta") is not None
    if not whole or b"\n" in data or b"\r" in data:  # an event is one line here
        return Payload(_filled(exactly(data, chunk)))
    return Payload(chunk, raw)


def _filled(chunk: dict[str, Any]) -> dict[str, Any]:
    if chunk.get("choices") is None:
        chunk["choices"] = []
    for choice in chunk["choices"]:
        if choice.get("delta") is None:
            choice["delta"] = {}
    return chunk


def is_finished(chunk: Mapping[str, Any]) -> bool:
    for choice in chunk.get("choices") or ():  # noqa: SIM110  # any() over a generator takes three times as long
        if choice.get("finish_reason"):
            return True
    return False
