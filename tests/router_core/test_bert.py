"""Compare the NumPy encoder with a small BERT computed by hand in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from router_core.distill import BertEncoder, gelu, read_safetensors

WIDTH, HEADS, HIDDEN, VOCABULARY, LENGTH = 4, 2, 8, 6, 3


def shapes() -> dict[str, tuple[int, ...]]:
    layer = "encoder.layer.0"
    squares = [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")]
    squares.append(f"{layer}.attention.output.dense")
    norms = ["embeddings.LayerNorm", f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    return {
        "embeddings.word_embeddings.weight": (VOCABULARY, WIDTH),
        "embeddings.position_embeddings.weight": (8, WIDTH),
        "embeddings.token_type_embeddings.weight": (2, WIDTH),
        **{f"{name}.weight": (WIDTH, WIDTH) for name in squares},
        f"{layer}.intermediate.dense.weight": (HIDDEN, WIDTH),
        f"{layer}.intermediate.dense.bias": (HIDDEN,),
        f"{layer}.output.dense.weight": (WIDTH, HIDDEN),
        f"{layer}.output.dense.bias": (WIDTH,),
        **{f"{name}.bias": (WIDTH,) for name in squares},
        **{f"{name}.{part}": (WIDTH,) for name in norms for part in ("weight", "bias")},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, shape in shapes().items():
        tensor = rng.normal(size=shape).astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(tensor)]}
        data += tensor
    encoded = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    config = {"num_attention_heads": HEADS, "layer_norm_eps": 1e-12, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def by_hand(tensors: dict[str, np.ndarray], sequence: list[int]) -> np.ndarray:
    """Return (length, d), one position and one head at a time."""
    t = {name.replace("encoder.layer.0.", ""): tensor.astype(np.float64) for name, tensor in tensors.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return np.asarray((x - x.mean()) / np.sqrt(x.var() + 1e-12) * t[f"{name}.weight"] + t[f"{name}.bias"])

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return np.asarray(t[f"{name}.weight"] @ x + t[f"{name}.bias"])

    segment = t["embeddings.token_type_embeddings.weight"][0]
    words, positions = t["embeddings.word_embeddings.weight"], t["embeddings.position_embeddings.weight"]
    states = [norm(words[token] + positions[at] + segment, "embeddings.LayerNorm") for at, token in enumerate(sequence)]
    queries, keys, values = (
        [linear(state, f"attention.self.{part}").reshape(HEADS, -1) for state in states]
        for part in ("query", "key", "value")
    )
    found = []
    for at, state in enumerate(states):
        mixed = []
        for head in range(HEADS):
            scores = np.exp([queries[at][head] @ key[head] / math.sqrt(WIDTH / HEADS) for key in keys])
            mixed.append(sum(s * value[head] for s, value in zip(scores / scores.sum(), values, strict=True)))
        attended = norm(linear(np.concatenate(mixed), "attention.output.dense") + state, "attention.output.LayerNorm")
        hidden = np.array([0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in linear(attended, "intermediate.dense")])
        found.append(norm(linear(hidden, "output.dense") + attended, "output.LayerNorm"))
    return np.array(found)


def test_hidden_states_are_those_of_the_formulas(folder: Path) -> None:
    sequences = np.array([[0, 1, 2], [3, 3, 5]])
    found = BertEncoder.load(folder)(sequences)
    tensors = read_safetensors(folder / "model.safetensors")
    assert found.shape == (2, LENGTH, WIDTH)
    for states, sequence in zip(found, sequences.tolist(), strict=True):
        assert states == pytest.approx(by_hand(dict(tensors), sequence), abs=1e-5)


def test_gelu_is_exact_to_a_millionth() -> None:
    values = np.linspace(-8, 8, 4001, dtype=np.float32)
    exact = [0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in values.tolist()]
    assert gelu(values) == pytest.approx(np.array(exact), abs=1e-6)
