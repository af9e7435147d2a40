"""The example of docs/library.md that uses the parts of router_core without a server, run as it stands."""

from pathlib import Path

import pytest

EXAMPLE = """\
from pathlib import Path

import numpy as np

from router_core import (
    Candidate, Pool, Price, Requirements, ScoringParams, builtin_map, eligible, measure, rank, static_embedder,
)

cluster_map = builtin_map()
embedder = static_embedder(Path.home() / ".cache" / "uniroute")
answered = cluster_map.assign(embedder.embed(["What is 17 times 23?", "Solve x² = 9.", "Name a colour of the sky."]))

def profile(*scores: float):
    lengths = np.full(3, 80.0)
    return measure(
        cluster_map.id, cluster_map.size, answered, np.array(scores), output_tokens=lengths, seconds=lengths / 50
    )

small = Candidate("small", profile(0, 0, 1), Price(input_cost_per_token=1e-7, output_cost_per_token=4e-7))
large = Candidate("large", profile(1, 1, 1), Price(input_cost_per_token=2.5e-6, output_cost_per_token=1e-5))
pool = Pool.build([small, large], cluster_map)

for prompt in ("What is 18 times 21?", "What colour is the sky?"):
    requirements = Requirements(prompt_tokens=8)
    assignment = cluster_map.assign(embedder.embed([prompt]))
    decision = rank(eligible(pool, requirements), assignment, requirements, ScoringParams(lambda_=0.2))
    best = decision.candidates[0]
    print(f"{prompt} {decision.chosen}: error {best.expected_error:.2f}, ${best.expected_cost_usd:.6f}")
"""

OUTPUT = """\
What is 18 times 21? large: error 0.27, $0.000820
What colour is the sky? small: error 0.15, $0.000033
"""


def test_the_parts_of_the_library_route_a_prompt_without_a_server(
    embedder_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "uniroute").symlink_to(embedder_cache)
    monkeypatch.setenv("HOME", str(tmp_path))
    exec(EXAMPLE, {})
    assert capsys.readouterr().out == OUTPUT


def test_the_documentation_shows_this_example() -> None:
    page = Path(__file__).parents[2] / "docs" / "library.md"
    if not page.exists():
        pytest.skip("the page is not in this tree")
    assert EXAMPLE in page.read_text("utf-8")
