from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxy.profiling.grading import profile_from_outcomes
from router_core.errors import InvalidOutcomes
from router_core.profiles import Profile
from tests.router_core.makers import FirstLetterEmbedder, a_map


def profile_of(tmp_path: Path, model: str, *rows: dict[str, Any]) -> Profile:
    path = tmp_path / "outcomes.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return profile_from_outcomes(path, model, a_map(), FirstLetterEmbedder())


def test_a_models_own_scores_lengths_and_times_become_its_profile(tmp_path: Path) -> None:
    profile = profile_of(
        tmp_path,
        "small",
        {
            "prompt": "a1",
            "scores": {"small": 1.0, "large": 0.0},
            "output_tokens": {"small": 4},
            "seconds": {"small": 2},
        },
        {"prompt": "b1", "scores": {"small": 0.25}, "output_tokens": {"small": 8}},
        {"prompt": "b2", "scores": {"large": 0.0}},
    )
    np.testing.assert_allclose(profile.labels, [1.0, 1.0, 0.0])
    np.testing.assert_allclose(profile.error_sums, [0.0, 0.75, 0.0])
    assert [profile.mean_output_tokens, profile.mean_seconds] == pytest.approx([6.0, 2.0])


def test_the_error_for_a_model_without_scores_names_the_models_that_have_some(tmp_path: Path) -> None:
    with pytest.raises(InvalidOutcomes, match="no line scores 'nobody'; it has large, small"):
        profile_of(tmp_path, "nobody", {"prompt": "a", "scores": {"small": 1, "large": 0}})
    with pytest.raises(InvalidOutcomes, match="no line scores 'nobody'; it has no lines"):
        profile_of(tmp_path, "nobody")


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidOutcomes, match=r"outcomes\.jsonl, line 2: scores\['small'\] must be .* got 7"):
        profile_of(tmp_path, "small", {"prompt": "a", "scores": {"small": 1}}, {"prompt": "b", "scores": {"small": 7}})
