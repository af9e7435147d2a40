from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_core.artifact import FORMAT, MANIFEST, SURFACE_FORMAT, load_map, save_map
from router_core.clustering import ClusterMap
from router_core.errors import InvalidArtifact, InvalidInput
from router_core.fitting import EmbeddedPrompts, fit_with_outcomes
from router_core.surface import SURFACE_FEATURES, surface_features
from router_core.types import Floats
from tests.router_core.makers import a_map

KNOWN = ("x", "y", "z")


def test_each_kind_of_byte_has_a_share() -> None:
    (found,) = surface_features(["12ab+ AB\n"])
    shares = {
        "digits": 2 / 9 / 0.2,
        "operators": 1 / 9 / 0.1,
        "code": 0.0,
        "capitals": 2 / 9 / 0.2,
        "lines": 1 / 9 / 0.05,
    }
    expected = [np.log2(9) / 12, *shares.values(), 0.0, 0.0]
    assert found == pytest.approx(np.minimum(expected, 1.0))


def test_the_share_of_other_scripts_counts_bytes() -> None:
    english, mixed, chinese = surface_features(["what is this", "what is 这", "这是什么"])[:, 6]
    assert english == 0.0
    assert mixed == pytest.approx(3 / 11)
    assert chinese == 1.0


@given(st.lists(st.text(), max_size=5))
def test_features_are_from_zero_to_one_and_one_by_one_equals_all_at_once(texts: list[str]) -> None:
    found = surface_features(texts)
    assert found.shape == (len(texts), SURFACE_FEATURES)
    assert ((found >= 0) & (found <= 1)).all()
    assert np.array_equal(found, [surface_features([text])[0] for text in texts] or found)


def test_a_lone_surrogate_has_features_too() -> None:
    assert np.isfinite(surface_features(["\ud800"])).all()


def told_apart_by_digits() -> tuple[list[str], Floats, np.ndarray]:
    """Draw 600 prompts whose vectors say nothing: the models are right on words and wrong on numbers."""
    rng = np.random.default_rng(0)
    texts = [str(rng.integers(10**8)) if row % 2 else "a few plain words" for row in range(600)]
    vectors = rng.normal(size=(600, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return texts, vectors, np.repeat(np.arange(600)[:, None] % 2 == 0, 3, axis=1).astype(np.float64)


@pytest.fixture(scope="module")
def fitted() -> ClusterMap:
    texts, vectors, scores = told_apart_by_digits()
    return fit_with_outcomes(EmbeddedPrompts(texts, vectors, "e"), scores, KNOWN, 4)


def test_learned_clusters_tell_apart_what_vectors_do_not(fitted: ClusterMap) -> None:
    texts, vectors, scores = told_apart_by_digits()
    weights = fitted.assign(vectors, fitted.surface_of(texts)).dense(fitted.size)
    (_, errors, trained) = (weights[:, group.columns] for group in fitted.groups)
    for learned in (errors, trained):
        nearest = learned.argmax(axis=1)
        shares = [scores[nearest == cluster, 0].mean() for cluster in np.unique(nearest)]
        assert set(np.round(shares)) == {0.0, 1.0}
        assert np.abs(np.array(shares) - 0.5).min() > 0.3


def test_a_map_that_reads_surface_features_asks_for_them(fitted: ClusterMap) -> None:
    _, vectors, _ = told_apart_by_digits()
    assert fitted.reads_surface
    with pytest.raises(InvalidInput, match="surface features"):
        fitted.assign(vectors)


def test_a_map_without_learned_clusters_reads_none() -> None:
    plain = a_map()
    assert not plain.reads_surface
    assert plain.surface_of(["a text"]) is None


def test_a_saved_map_says_whether_it_reads_surface_features(fitted: ClusterMap, tmp_path: Path) -> None:
    save_map(fitted, tmp_path / "reads")
    save_map(a_map(), tmp_path / "plain")
    reads, plain = (json.loads((tmp_path / name / MANIFEST).read_text()) for name in ("reads", "plain"))
    assert (reads["format"], reads["surface"]) == (SURFACE_FORMAT, 1)
    assert (plain["format"], plain.get("surface")) == (FORMAT, None)
    assert load_map(tmp_path / "reads").id == fitted.id


@pytest.mark.parametrize("change", [{"surface": 2}, {"surface": None}, {"format": FORMAT}])
def test_a_map_of_other_features_is_refused(fitted: ClusterMap, tmp_path: Path, change: dict[str, object]) -> None:
    save_map(fitted, tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | change))
    with pytest.raises(InvalidArtifact):
        load_map(tmp_path)
