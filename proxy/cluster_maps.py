"""Which cluster map a deployment measures and routes with. What a map does is router_core's."""

from __future__ import annotations

from pathlib import Path

from proxy.settings.schema import Settings
from router_core.artifact import builtin_map, load_map
from router_core.clustering import ClusterMap
from router_core.recipes import RECIPES


def open_map(settings: Settings) -> ClusterMap:
    """The map of `settings.map`, assigned as `settings.recipe` counts: a hard recipe puts a prompt in one cluster.

    Raises:
        RouterCoreError, OSError: the map cannot be read.
    """
    chosen = builtin_map() if settings.map == "builtin" else load_map(Path(settings.map))
    return chosen.hardened() if RECIPES[settings.recipe].hard else chosen
