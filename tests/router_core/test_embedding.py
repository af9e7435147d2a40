import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from router_core.embedding import StaticEmbedder, TransformerEmbedder, open_embedder
from router_core.errors import InvalidArtifact

TEXTS = [
    "How do I sort a list in Python?",
    "Sort a Python list, please.",
    "What is the capital of Portugal?",
    "葡萄牙的首都是哪里？",
]


def test_vectors_have_unit_length(embedder: StaticEmbedder) -> None:
    assert np.linalg.norm(embedder.embed(TEXTS), axis=1) == pytest.approx(np.ones(4), abs=1e-5)


def test_similar_texts_have_similar_vectors(embedder: StaticEmbedder) -> None:
    sort, again, capital, _ = embedder.embed(TEXTS)
    assert sort @ again > 0.6 > sort @ capital


def test_one_by_one_equals_all_at_once(embedder: StaticEmbedder) -> None:
    one_by_one = np.vstack([embedder.embed([text]) for text in TEXTS])
    assert np.array_equal(one_by_one, embedder.embed(TEXTS))


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_a_text_without_tokens_gives_a_zero_row(embedder: StaticEmbedder, text: str) -> None:
    assert not embedder.embed([text]).any()


@pytest.mark.parametrize("text", ["\ud800 lone", "\x00", "a" * 100_000, "🙂" * 500, "\u200b"])
def test_odd_texts_are_embedded_too(embedder: StaticEmbedder, text: str) -> None:
    assert np.isfinite(embedder.embed([text])).all()


def test_long_texts_are_not_truncated(embedder: StaticEmbedder) -> None:
    long, longer = embedder.embed(["word " * 1000, "word " * 1000 + "python list"])
    assert not np.array_equal(long, longer)


def test_a_table_and_weights_of_two_vocabularies_are_refused(embedder_cache: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "weights.npy", np.ones(3, dtype=np.float32))
    with pytest.raises(InvalidArtifact, match="3 weights"):
        StaticEmbedder.load(embedder_cache / "static-1", tmp_path / "weights.npy")


def test_serving_loads_no_torch(embedder_cache: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from router_core.embedding import static_embedder\n"
        "from router_core.artifact import builtin_map\n"
        "vectors = static_embedder(pathlib.Path(sys.argv[1])).embed(['hello']); builtin_map().assign(vectors)\n"
        "print(sorted({'torch', 'sentence_transformers', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(embedder_cache)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_transformer_has_the_same_protocol(tmp_path: Path) -> None:
    transformer = open_embedder("transformer", tmp_path)
    assert isinstance(transformer, TransformerEmbedder)
    sort, again, capital, blank = transformer.embed([*TEXTS[:3], " "])
    assert sort @ again > 0.6 > sort @ capital
    assert not blank.any()
    assert transformer.dimension == 384
