import subprocess
import sys

import pytest

import router_core

PUBLIC = """
    FREE Assignment Candidate Capabilities ClusterMap Eligibility Embedder InvalidArtifact InvalidInput InvalidPrice
    InvalidProfile MapMismatch NoEligibleModel Pool Price Profile Requirements Router RouterCoreError RoutingDecision
    ScoredCandidate ScoringParams StaticEmbedder TransformerEmbedder builtin_map eligible fit_map load_map measure
    open_embedder rank save_map static_embedder
"""


def test_these_names_are_public_and_no_others() -> None:
    assert sorted(router_core.__all__) == sorted(PUBLIC.split())


@pytest.mark.parametrize("name", router_core.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    found = getattr(router_core, name)
    assert getattr(found, "__name__", name) == name
    assert getattr(found, "__module__", "router_core.").startswith("router_core.")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Rooter"):
        router_core.__getattr__("Rooter")


def test_importing_the_package_loads_no_numpy() -> None:
    code = "import sys, router_core; print('numpy' in sys.modules, router_core.InvalidInput.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "InvalidInput"]
