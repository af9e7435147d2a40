"""Why no model is left for a request, in words that help whoever sent it. Decides nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from proxy.errors import NothingAble, TooLong, Unavailable
from proxy.routing.asked import Asked
from router_core.eligibility import eligible
from router_core.types import Needs

_SHOWN = 10


def nothing_left(asked: Asked, usable: tuple[str, ...], why: Mapping[str, str]) -> NothingAble | Unavailable:
    if not usable:
        return Unavailable("no model is registered that this request may use")
    reasons = because(why, usable)
    if not eligible(asked.state.pool, Needs(), asked.allowed).rows.size:
        return Unavailable(f"no model can be chosen yet{reasons}")
    if eligible(asked.state.pool, replace(asked.needs, prompt_tokens=0), asked.allowed).rows.size:
        tokens = asked.needs.prompt_tokens
        return TooLong(
            f"the request of about {tokens} tokens fits no model's context window{reasons}", param="messages"
        )
    return NothingAble(f"no model can take this request{reasons}")


def because(why: Mapping[str, str], usable: tuple[str, ...]) -> str:
    reasons = [f"{name}: {reason}" for name, reason in why.items() if name in usable]
    more = f" and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    return f" ({'; '.join(reasons[:_SHOWN])}{more})" if reasons else ""
