"""When a model is left alone, and for how long. Numbers only; what they do is breaker and verdicts."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from proxy.setting_types import Amount, Frozen, Whole

Span = Annotated[Amount, Field(gt=0, le=86_400)]


class HealthPolicy(Frozen):
    """The setting `breaker`. A model rests once `failures` attempts within `window_s` seconds have failed, if they are
    at least `share` of the attempts that ended in that time. It rests for `cooldown_s`, doubled for each probe that
    fails, and never longer than `longest_cooldown_s`."""

    window_s: Span = 30
    failures: Annotated[Whole, Field(ge=1, le=10_000)] = 5
    share: Annotated[Amount, Field(gt=0, le=1)] = 0.5
    cooldown_s: Span = 10
    longest_cooldown_s: Span = 300

    @model_validator(mode="after")
    def _longest_is_longest(self) -> HealthPolicy:
        if self.longest_cooldown_s < self.cooldown_s:
            raise ValueError(
                f"longest_cooldown_s: must be at least cooldown_s, {self.cooldown_s:g}; got {self.longest_cooldown_s:g}"
            )
        return self
