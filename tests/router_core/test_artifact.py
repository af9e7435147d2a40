import json
from pathlib import Path

import numpy as np
import pytest

from router_core.artifact import ARRAYS, MANIFEST, builtin_map, load_map, save_map
from router_core.clustering import FittedPrompts
from router_core.embedding import StaticEmbedder
from router_core.errors import InvalidArtifact
from router_core.fitting import EmbeddedPrompts, fit_with_outcomes
from tests.router_core.makers import a_map


def test_a_saved_map_assigns_as_before(tmp_path: Path) -> None:
    saved = a_map(top=2)
    save_map(saved, tmp_path / "map")
    loaded = load_map(tmp_path / "map")
    vectors = np.array([[0.6, 0.8, 0.0]], dtype=np.float32)
    assert loaded.id == saved.id
    assert loaded.names == saved.names
    assert np.array_equal(loaded.assign(vectors).weights, saved.assign(vectors).weights)


def test_a_map_with_reference_models_is_saved_with_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(600, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = rng.integers(0, 2, (600, 3)).astype(np.float64)
    saved = fit_with_outcomes(EmbeddedPrompts(["word"] * 600, vectors, "e"), scores, ("x", "y", "z"), 4)
    save_map(saved, tmp_path)
    loaded = load_map(tmp_path)
    assert loaded.id == saved.id
    surface = loaded.surface_of(["word"] * 600)
    assert np.array_equal(loaded.assign(vectors, surface).weights, saved.assign(vectors, surface).weights)
    assert loaded.reference_models is not None
    assert saved.reference_models is not None
    assert loaded.reference_models.models == ("x", "y", "z")
    for name in ("overlap", "error_sums", "labels"):
        assert np.array_equal(getattr(loaded.reference_models, name), getattr(saved.reference_models, name))
    assert loaded.fitted_prompts is not None
    assert saved.fitted_prompts is not None
    assert (loaded.fitted_prompts.count, loaded.fitted_prompts.novel_below) == (600, saved.fitted_prompts.novel_below)
    assert np.array_equal(loaded.fitted_prompts.shares, saved.fitted_prompts.shares)


def test_a_map_without_figures_of_its_prompts_is_read_as_before(tmp_path: Path) -> None:
    save_map(a_map(), tmp_path)
    assert "prompts" not in json.loads((tmp_path / MANIFEST).read_text())
    assert load_map(tmp_path).fitted_prompts is None


@pytest.mark.parametrize("prompts", [{}, {"count": 0, "novel_below": 0.1}, {"count": 1, "novel_below": 7}, "many"])
def test_figures_of_prompts_that_make_no_sense_are_refused(tmp_path: Path, prompts: object) -> None:
    save_map(a_map().with_known(fitted_prompts=FittedPrompts(5, np.full(3, 1 / 3), 0.5)), tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"prompts": prompts}))
    with pytest.raises(InvalidArtifact, match="complete"):
        load_map(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("temperature", 0.5), ("embedder", "another"), ("top", 3)])
def test_a_manifest_that_was_edited_is_refused(tmp_path: Path, key: str, value: object) -> None:
    save_map(a_map(), tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | {key: value}))
    with pytest.raises(InvalidArtifact, match="does not match"):
        load_map(tmp_path)


def test_arrays_that_were_changed_are_refused(tmp_path: Path) -> None:
    save_map(a_map(), tmp_path)
    with (tmp_path / ARRAYS).open("ab") as file:
        file.write(b"x")
    with pytest.raises(InvalidArtifact, match="digest"):
        load_map(tmp_path)


@pytest.mark.parametrize("manifest", ["", "[]", '{"format": 99}', "{"])
def test_a_folder_that_is_no_map_is_refused(tmp_path: Path, manifest: str) -> None:
    (tmp_path / MANIFEST).write_text(manifest)
    with pytest.raises(InvalidArtifact, match="manifest"):
        load_map(tmp_path)


def test_a_missing_folder_is_refused_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidArtifact, match="uniroute fit"):
        load_map(tmp_path / "nowhere")


def test_the_builtin_map_fits_the_static_embedder(embedder: StaticEmbedder) -> None:
    cluster_map = builtin_map()
    assert cluster_map.embedder_id == embedder.id
    assert cluster_map.dimension == embedder.dimension
    assert len(set(cluster_map.names)) == cluster_map.size
