"""UniRoute's routing rule as a library: embeddings, clusters, profiles, prices and scores, with no server.

Names are imported when they are first used: a process that only grades answers does not load NumPy.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from router_core.artifact import builtin_map, load_map, save_map
    from router_core.clustering import ClusterMap
    from router_core.decision import RoutingDecision, ScoredCandidate
    from router_core.eligibility import Eligibility, eligible
    from router_core.embedding import StaticEmbedder, TransformerEmbedder, open_embedder, static_embedder
    from router_core.errors import (
        InvalidArtifact,
        InvalidInput,
        InvalidPrice,
        InvalidProfile,
        MapMismatch,
        NoEligibleModel,
        RouterCoreError,
    )
    from router_core.fitting import fit_map
    from router_core.pool import Candidate, Pool
    from router_core.profiles import Profile, measure
    from router_core.router import Router
    from router_core.scoring import ScoringParams, rank
    from router_core.types import FREE, Assignment, Capabilities, Embedder, Price, Requirements

# Public name → its module.
_MODULES = {
    "Assignment": "types",
    "Candidate": "pool",
    "Capabilities": "types",
    "ClusterMap": "clustering",
    "Eligibility": "eligibility",
    "Embedder": "types",
    "FREE": "types",
    "InvalidArtifact": "errors",
    "InvalidInput": "errors",
    "InvalidPrice": "errors",
    "InvalidProfile": "errors",
    "MapMismatch": "errors",
    "NoEligibleModel": "errors",
    "Pool": "pool",
    "Price": "types",
    "Profile": "profiles",
    "Requirements": "types",
    "Router": "router",
    "RouterCoreError": "errors",
    "RoutingDecision": "decision",
    "ScoredCandidate": "decision",
    "ScoringParams": "scoring",
    "StaticEmbedder": "embedding",
    "TransformerEmbedder": "embedding",
    "builtin_map": "artifact",
    "eligible": "eligibility",
    "fit_map": "fitting",
    "load_map": "artifact",
    "measure": "profiles",
    "open_embedder": "embedding",
    "rank": "scoring",
    "save_map": "artifact",
    "static_embedder": "embedding",
}

__all__ = [
    "FREE",
    "Assignment",
    "Candidate",
    "Capabilities",
    "ClusterMap",
    "Eligibility",
    "Embedder",
    "InvalidArtifact",
    "InvalidInput",
    "InvalidPrice",
    "InvalidProfile",
    "MapMismatch",
    "NoEligibleModel",
    "Pool",
    "Price",
    "Profile",
    "Requirements",
    "Router",
    "RouterCoreError",
    "RoutingDecision",
    "ScoredCandidate",
    "ScoringParams",
    "StaticEmbedder",
    "TransformerEmbedder",
    "builtin_map",
    "eligible",
    "fit_map",
    "load_map",
    "measure",
    "open_embedder",
    "rank",
    "save_map",
    "static_embedder",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"router_core.{_MODULES[name]}"), name)
