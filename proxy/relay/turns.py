"""One model's turn to answer: its place among the others, and what its outcome says of its health. Asks nobody."""

from __future__ import annotations

from proxy.errors import UpstreamFailure
from proxy.recording.meter import Meter
from proxy.upstream.concurrency_limit import Slot
from proxy.upstream.health import Attempt


class Turn:
    """To be closed, however it ended; closing without an outcome says nothing of the model."""

    def __init__(self, meter: Meter, attempt: Attempt, slot: Slot, *, hurried: bool) -> None:
        """`hurried`: the caller's own time limit is shorter than the model's, so that missing it is no fault."""
        self._meter = meter
        self._attempt = attempt
        self._slot = slot
        self._hurried = hurried

    def begun(self) -> None:
        """Its first content has come."""
        self._meter.first_content()
        self._attempt.answering()

    def answered(self) -> None:
        self._attempt.succeeded()
        self.close()

    def failed(self, failure: UpstreamFailure) -> None:
        self._meter.failed(failure)
        if not (failure.timed_out and self._hurried):
            self._attempt.failed(failure)
        self.close()

    def close(self) -> None:
        self._attempt.abandoned()
        self._slot.release()
