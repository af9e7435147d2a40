from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from proxy.app import _open_routing
from proxy.server.startup import load_cluster_map
from proxy.settings.schema import Settings
from router_core import kernels
from router_core.clustering import ClusterMap


@pytest.mark.parametrize("recipe", ["raw", "laplace"])
async def test_a_hard_recipe_assigns_a_prompt_to_its_nearest_cluster_alone(
    recipe: Literal["raw", "laplace"], cluster_map: ClusterMap, embedder_cache: Path
) -> None:
    served, assigner = _open_routing(Settings(recipe=recipe, data_dir=embedder_cache))
    assignment = assigner._assign("Write a function to find the largest number.", served)
    soft = assigner._assign("Write a function to find the largest number.", cluster_map)
    assigner.close()

    assert assignment.weights.tolist() == [[1.0]]
    assert assignment.ids[0, 0] == soft.ids[0, 0]
    assert served.id == cluster_map.with_hard_assignment().id != cluster_map.id


def test_the_default_recipe_assigns_a_prompt_to_several_clusters(cluster_map: ClusterMap) -> None:
    assert load_cluster_map(Settings()).id == cluster_map.id


@pytest.mark.parametrize("allowed", [True, False])
def test_the_setting_decides_whether_compiled_kernels_are_used(allowed: bool, embedder_cache: Path) -> None:
    try:
        _, assigner = _open_routing(Settings(compiled=allowed, data_dir=embedder_cache))
        assigner.close()
        in_use = kernels.current()
    finally:
        kernels.use(None)
    assert in_use == ((allowed and kernels.compiled()) or kernels.NUMPY)
