"""The numbers of routing: embeddings, clusters, profiles, prices, scores. No HTTP, no environment, no clock."""

from router_core.decision import RoutingDecision
from router_core.router import Router

__all__ = ["Router", "RoutingDecision"]
