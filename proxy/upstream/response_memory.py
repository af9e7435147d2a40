from __future__ import annotations

import logging
from time import monotonic

from proxy.errors import ResponseMemoryFull, ResponseTooLarge
from proxy.json_text import MAX_VALUES, SMALL_BYTES, JSONSizeCounter, JSONTooLarge

log = logging.getLogger("uniroute.upstream")

MAX_RESPONSE_BYTES = 20_000_000

MAX_TOTAL_BYTES = 256_000_000

_LOG_INTERVAL_S = 10.0


class ResponseMemory:
    """Bound the memory for upstreams' responses, of each and of all together. One per process, on one event loop.

    Responses of at most SMALL_BYTES are not counted: the number of connections bounds them.
    """

    def __init__(self, max_response_bytes: int = MAX_RESPONSE_BYTES, max_total_bytes: int = MAX_TOTAL_BYTES) -> None:
        """
        Args:
            max_response_bytes: of one response, or of one event of a stream (`max_answer_bytes`).
            max_total_bytes: of all that are held at once (`max_answers_in_flight_bytes`); one always fits.
        """
        self.max_response_bytes = max_response_bytes
        self.used_bytes = 0
        self._max_total_bytes = max(max_total_bytes, max_response_bytes)
        self._logged_at = -_LOG_INTERVAL_S

    def acquire(self, size: int) -> None:
        """Raises ResponseMemoryFull, and acquires nothing then."""
        if self.used_bytes + size > self._max_total_bytes:
            self._log_full()
            raise ResponseMemoryFull(
                f"no room for another large answer: those on their way hold {self.used_bytes} bytes"
                " (max_answers_in_flight_bytes)"
            )
        self.used_bytes += size

    def _log_full(self) -> None:
        now = monotonic()
        if now - self._logged_at >= _LOG_INTERVAL_S:
            self._logged_at = now
            log.warning(
                "answers on their way hold %d of %d bytes (max_answers_in_flight_bytes): large ones are refused",
                self.used_bytes,
                self._max_total_bytes,
            )


class HeldMemory:
    """The memory that one response holds, until `release` or until nothing refers to this any more.

    The latter makes sure that it is given back on every path.
    """

    __slots__ = ("_memory", "size")

    def __init__(self, memory: ResponseMemory, size: int = 0) -> None:
        """Raises ResponseMemoryFull."""
        self._memory = memory
        self.size = 0
        self.grow_to(size)

    def grow_to(self, size: int) -> None:
        """Raises ResponseMemoryFull, and keeps its size then."""
        if size > self.size:
            self._memory.acquire(size - self.size)
            self.size = size

    def release(self) -> None:
        self._memory.used_bytes -= self.size
        self.size = 0

    __del__ = release


class ResponseBounds:
    """Check one JSON text of an upstream, or one line after the other, while its bytes arrive.

    As a context manager it gives the memory back on an error. Otherwise whoever takes `held` has it.
    """

    def __init__(self, memory: ResponseMemory, max_values: int = MAX_VALUES) -> None:
        """`max_values`: how many values one text may hold."""
        self.held = HeldMemory(memory)
        self.memory = memory
        self._max_values = max_values
        self.restart()

    def restart(self) -> None:
        """Begin another text, and give back the memory of the last."""
        self.held.release()
        self._size = 0
        self._uncounted: list[bytes] = []
        self._counter: JSONSizeCounter | None = None

    def __enter__(self) -> ResponseBounds:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.held.release()

    @property
    def values(self) -> int:
        """Return an upper bound of how many values the text holds."""
        return self._counter.values if self._counter is not None else self._size // 2 + 1

    def add_bytes(self, size: int) -> None:
        """Count bytes that are not known to be JSON. Raises ResponseTooLarge, ResponseMemoryFull."""
        self._size += size
        if self._size > self.memory.max_response_bytes:
            raise self.too_large()
        if self._size > SMALL_BYTES:
            self.held.grow_to(self._size)

    def add(self, piece: bytes) -> None:
        """Count bytes and values of a piece of JSON. Raises ResponseTooLarge, ResponseMemoryFull."""
        self.add_bytes(len(piece))
        self.count_values(piece)

    def count_values(self, piece: bytes) -> None:
        """Count the values of a piece whose bytes are counted already. Raises ResponseTooLarge."""
        if self._size <= SMALL_BYTES:
            self._uncounted.append(piece)
            return
        if self._counter is None:
            piece = b"".join((*self._uncounted, piece))
            self._counter, self._uncounted = JSONSizeCounter(self._max_values), []
        try:
            self._counter.feed(piece)
        except JSONTooLarge as error:
            raise ResponseTooLarge(f"the model's answer {error}") from error

    def too_large(self) -> ResponseTooLarge:
        return ResponseTooLarge(
            f"the model's answer is larger than {self.memory.max_response_bytes} bytes (max_answer_bytes)"
        )

    def add_lines(self, piece: bytes) -> None:
        """Count a piece of lines, each of which is a text of its own. Raises as `add`."""
        if self._counter is None and self._size + len(piece) <= SMALL_BYTES:  # no line of it is large
            start = piece.rfind(b"\n") + 1
            if start:
                self._size, self._uncounted = 0, []
            self._size += len(piece) - start
            self._uncounted.append(piece[start:])
            return
        first, *others = piece.split(b"\n")
        self.add(first)
        for line in others:
            self.restart()
            self.add(line)


class ValueLimit:
    """Hold no more values in an answer that is put together from events than in a whole one."""

    def __init__(self) -> None:
        self._left = MAX_VALUES

    def add(self, count: int) -> None:
        """Raises ResponseTooLarge."""
        self._left -= count
        if self._left < 0:
            raise ResponseTooLarge(f"the model's answer holds more than {MAX_VALUES} values")


class JSONBody:
    """Collect a body that is one JSON text, all of which has to come before any of it is known."""

    finished = done = False

    def __init__(self, bounds: ResponseBounds) -> None:
        """`bounds`: of the body; what is made of it then holds its memory."""
        self.bounds = bounds
        self.size = 0
        self._pieces: list[bytes] = []

    def feed(self, piece: bytes) -> None:
        """Raises ResponseTooLarge, ResponseMemoryFull."""
        self.bounds.add(piece)
        self._pieces.append(piece)
        self.size += len(piece)

    def break_off(self) -> bool:
        """Note that the connection broke, and return whether the answer was complete: that shows at its end alone."""
        return False

    def join(self) -> bytes:
        return b"".join(self._pieces)

    def take(self) -> bytes:
        """Return all of it, and let go of the pieces."""
        data, self._pieces = self.join(), []
        return data
