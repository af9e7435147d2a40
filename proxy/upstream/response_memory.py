from __future__ import annotations

import logging
from time import monotonic

from proxy.errors import AnswerTooLarge, NoRoomForAnswer
from proxy.json_limits import MAX_VALUES, SMALL_BYTES, JSONSizeCounter, JSONTooLarge

log = logging.getLogger("uniroute.upstream")

MAX_RESPONSE_BYTES = 20_000_000

MAX_TOTAL_BYTES = 256_000_000

_SAID_EVERY_S = 10.0


class ResponseMemory:
    """One per process, on one event loop. What is no larger than SMALL is not counted: connections bound it."""

    def __init__(self, largest: int = MAX_RESPONSE_BYTES, most: int = MAX_TOTAL_BYTES) -> None:
        """
        Args:
            largest: bytes of one answer, or of one event of a stream (`max_answer_bytes`).
            most: bytes of all that are held at once (`max_answers_in_flight_bytes`); there is room for one in any case.
        """
        self.largest = largest
        self.taken = 0
        self._most = max(most, largest)
        self._said_at = -_SAID_EVERY_S

    def take(self, size: int) -> None:
        """Raises NoRoomForAnswer, and takes nothing then."""
        if self.taken + size > self._most:
            self._say()
            raise NoRoomForAnswer(
                f"no room for another large answer: those on their way hold {self.taken} bytes"
                " (max_answers_in_flight_bytes)"
            )
        self.taken += size

    def _say(self) -> None:
        now = monotonic()
        if now - self._said_at >= _SAID_EVERY_S:
            self._said_at = now
            log.warning(
                "answers on their way hold %d of %d bytes (max_answers_in_flight_bytes): large ones are refused",
                *(self.taken, self._most),
            )


class HeldMemory:
    """What one answer takes of the room: given back by `release`, or once nothing refers to it any more, so that no
    path leaves it taken."""

    __slots__ = ("_room", "size")

    def __init__(self, room: ResponseMemory, size: int = 0) -> None:
        """Raises NoRoomForAnswer."""
        self._room = room
        self.size = 0
        self.grow_to(size)

    def grow_to(self, size: int) -> None:
        """Raises NoRoomForAnswer; then it is as large as before."""
        if size > self.size:
            self._room.take(size - self.size)
            self.size = size

    def release(self) -> None:
        self._room.taken -= self.size
        self.size = 0

    __del__ = release


class ResponseBounds:
    """Of one JSON text of an upstream, or of one line after the other, as its bytes come. Used as a context, it gives
    back what it holds where that fails; else whoever takes `held` has it."""

    def __init__(self, room: ResponseMemory, values: int = MAX_VALUES) -> None:
        """`values`: how many one text may hold."""
        self.held = HeldMemory(room)
        self.room = room
        self._most_values = values
        self.restart()

    def restart(self) -> None:
        """What comes now is another text. What was held is not any more."""
        self.held.release()
        self._size = 0
        self._unseen: list[bytes] = []
        self._shape: JSONSizeCounter | None = None

    def __enter__(self) -> ResponseBounds:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.held.release()

    @property
    def values(self) -> int:
        """No fewer than it holds."""
        return self._shape.values if self._shape is not None else self._size // 2 + 1

    def add_bytes(self, size: int) -> None:
        """Of a text that is looked at later, or not here. Raises AnswerTooLarge, NoRoomForAnswer."""
        self._size += size
        if self._size > self.room.largest:
            raise self.too_large()
        if self._size > SMALL_BYTES:
            self.held.grow_to(self._size)

    def add(self, piece: bytes) -> None:
        """Raises AnswerTooLarge, NoRoomForAnswer."""
        self.add_bytes(len(piece))
        self.look_at(piece)

    def look_at(self, piece: bytes) -> None:
        """What was added as bytes is JSON. Raises AnswerTooLarge."""
        if self._size <= SMALL_BYTES:
            self._unseen.append(piece)
            return
        if self._shape is None:
            self._shape, piece, self._unseen = JSONSizeCounter(self._most_values), b"".join((*self._unseen, piece)), []
        try:
            self._shape.feed(piece)
        except JSONTooLarge as error:
            raise AnswerTooLarge(f"the model's answer {error}") from error

    def too_large(self) -> AnswerTooLarge:
        return AnswerTooLarge(f"the model's answer is larger than {self.room.largest} bytes (max_answer_bytes)")

    def add_lines(self, piece: bytes) -> None:
        """Each line is a text. Raises as `add`."""
        if self._shape is None and self._size + len(piece) <= SMALL_BYTES:  # no line of it is large
            start = piece.rfind(b"\n") + 1
            if start:
                self._size, self._unseen = 0, []
            self._size += len(piece) - start
            self._unseen.append(piece[start:])
            return
        first, *others = piece.split(b"\n")
        self.add(first)
        for line in others:
            self.restart()
            self.add(line)
