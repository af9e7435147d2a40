"""The numbers of routing: embeddings, clusters, profiles, prices, scores. No HTTP, no environment, no clock."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from router_core.decision import RoutingDecision
    from router_core.router import Router

__all__ = ["Router", "RoutingDecision"]


def __getattr__(name: str) -> object:
    """Import what is asked for when it is: a process that only grades answers needs no numpy."""
    if name == "Router":
        from router_core.router import Router

        return Router
    if name == "RoutingDecision":
        from router_core.decision import RoutingDecision

        return RoutingDecision
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
