"""Why no model is left for a request, in words that help whoever sent it. Decides nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import cached_property

from proxy.errors import NothingAble, NotMeasured, TooLong, Unavailable
from proxy.routing.asked import Asked
from proxy.routing.features import asked_for
from proxy.routing.names import usable_models
from router_core.eligibility import Eligibility, eligible
from router_core.errors import NoEligibleModel
from router_core.types import ABILITIES, Needs

_SHOWN = 10
_SHOWN_CHARACTERS = 2_000


class RuledOut(Mapping[str, str]):
    """Ruled-out model → why, of those that the caller may use. Worked out when somebody looks: few requests are."""

    def __init__(self, asked: Asked, eligibility: Eligibility | None, *, but: str | None = None) -> None:
        self._asked = asked
        self._eligibility = eligibility
        self._but = but

    @cached_property
    def _reasons(self) -> dict[str, str]:
        why = self._eligibility.why if self._eligibility else {}
        usable = set(usable_models(self._asked.state, self._asked.key)) - {self._but}
        return {name: reason for name, reason in why.items() if name in usable}

    def __getitem__(self, name: str) -> str:
        return self._reasons[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._reasons)

    def __len__(self) -> int:
        return len(self._reasons)


def nothing_left(asked: Asked, eligibility: Eligibility) -> NothingAble | Unavailable:
    pool, needs, allowed = asked.state.pool, asked.needs, asked.allowed
    if not usable_models(asked.state, asked.key):
        return Unavailable("no model is registered that this request may use")
    if not _candidates(asked):
        return NothingAble("`models`, `provider.only` and `provider.ignore` together leave no model", param="provider")
    reasons = _because(asked, eligibility.why)
    if not eligible(pool, Needs(), allowed).rows.size:
        return NotMeasured(f"no model can be chosen yet{reasons}", _of_candidates(asked, eligibility.why))
    if eligible(pool, needs, allowed).rows.size:
        return Unavailable(f"every model that can take this request rests after failures{reasons}")
    if eligible(pool, replace(needs, prompt_tokens=0), allowed).rows.size:
        return TooLong(
            f"the request of about {needs.prompt_tokens} tokens{_and_answer(needs)} fits no model's context window"
            f"{reasons}",
            param="messages",
        )
    return NothingAble(f"no model can take this request{_which_needs(asked)}{reasons}")


def too_dear(asked: Asked, error: NoEligibleModel) -> NothingAble:
    """Models are able, and none of them within max_cost_usd."""
    return NothingAble(f"{error}{_because(asked, error.why)}", param="uniroute.max_cost_usd")


def _candidates(asked: Asked) -> Collection[str]:
    """Names that this caller and this request allow: no others are spoken of."""
    usable = set(usable_models(asked.state, asked.key))
    return usable if asked.allowed is None else usable & set(asked.allowed)


def _because(asked: Asked, why: Mapping[str, str]) -> str:
    return listed(_of_candidates(asked, why))


def _of_candidates(asked: Asked, why: Mapping[str, str]) -> dict[str, str]:
    candidates = _candidates(asked)
    return {name: reason for name, reason in why.items() if name in candidates}


def listed(reasons: Mapping[str, str]) -> str:
    """(name: reasons; name: reasons; and 90 more), of bounded length."""
    shown: list[str] = []
    length = 0
    for name, reason in reasons.items():
        length += len(name) + len(reason)
        if len(shown) == _SHOWN or length > _SHOWN_CHARACTERS:
            break
        shown.append(f"{name}: {reason}")
    more = f"; and {len(reasons) - len(shown)} more" if len(reasons) > len(shown) else ""
    return f" ({'; '.join(shown)}{more})" if reasons else ""


def _and_answer(needs: Needs) -> str:
    return "" if needs.max_output_tokens is None else f", and {needs.max_output_tokens} of an answer,"


def _which_needs(asked: Asked) -> str:
    """, which needs to read images (messages[3] has image_url)…"""
    asks = asked_for(asked.request.body)
    told = [f"to {words} ({asks[ability]})" for ability, words in ABILITIES.items() if ability in asks]
    return f", which needs a model {', '.join(told)}" if told else ""
