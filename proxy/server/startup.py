from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proxy.errors import Starting

if TYPE_CHECKING:
    from proxy.server.dependencies import AppState

MAX_RETRY_AFTER_S = 60

# The exit status of a process that could not start, as uvicorn has it.
START_FAILED = 3


@dataclass
class Step:
    """A step of the start; several may be under way at once. `total` is 0 while it is unknown."""

    what: str
    unit: str
    began: float
    done: int = 0
    total: int = 0

    def update(self, done: int, total: int) -> None:
        self.done, self.total = done, total

    def to_json(self) -> dict[str, Any]:
        return {"what": self.what, **({"done": self.done, "total": self.total} if self.total else {})}

    def __str__(self) -> str:
        return f"{self.what} ({self.done} of {self.total} {self.unit})" if self.total else self.what


class Startup:
    """The progress of one start, written by the task that opens the app's state and by its threads.

    Args:
        app_state: the state, if it is open already.
    """

    def __init__(self, app_state: AppState | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.app_state = app_state
        self._clock = clock
        self._steps: list[Step] = []
        self.failure: Exception | None = None
        """The exception that ended the start."""

    @contextmanager
    def step(self, what: str, unit: str = "", total: int = 0) -> Iterator[Step]:
        step = Step(what, unit, self._clock(), total=total)
        self._steps.append(step)
        try:
            yield step
        finally:
            self._steps.remove(step)

    def to_json(self) -> dict[str, Any]:
        """Return the body of /readyz during the start."""
        return {"status": "starting", "under_way": [step.to_json() for step in tuple(self._steps)]}

    def refusal(self) -> Starting:
        """Return the error that answers every call which needs the services."""
        steps = tuple(self._steps)
        doing = ": " + ", ".join(map(str, steps)) if steps else ""
        retry_after_s = max((self._left_s(step) for step in steps), default=1)
        message = f"this server is starting{doing}; try again, and see /readyz"
        return Starting(message, headers={"retry-after": str(retry_after_s)})

    def _left_s(self, step: Step) -> int:
        """Estimate how long the rest of a step takes, at its rate so far."""
        if not 0 < step.done < step.total:
            return 1
        left_s = (self._clock() - step.began) / step.done * (step.total - step.done)
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(left_s)))
