import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from router_core import embedding
from router_core.distill import TABLE, TOKENIZER, embedder_id, model_folder, token_weights, weighted
from router_core.embedding import StaticEmbedder, TransformerEmbedder, open_embedder, static_embedder
from router_core.errors import InvalidArtifact
from router_core.types import Floats

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


def test_a_table_and_weights_of_two_vocabularies_are_refused() -> None:
    with pytest.raises(InvalidArtifact, match="4 rows but there are 3 weights"):
        weighted(np.ones((4, 2), dtype=np.float32), np.ones(3, dtype=np.float32))


def an_earlier_table(cache: Path, tokenizer: Path) -> Floats:
    """Write a table as earlier versions did, whose rows are not weighted."""
    folder = cache / "static-1"
    folder.mkdir(parents=True)
    rows = np.random.default_rng(0).normal(size=(len(token_weights()), 3)).astype(np.float32)
    np.save(folder / TABLE, rows)
    shutil.copy(tokenizer, folder / TOKENIZER)
    return rows


def test_a_table_of_an_earlier_version_is_weighted_and_not_made_anew(embedder_cache: Path, tmp_path: Path) -> None:
    rows, announced = an_earlier_table(tmp_path, embedder_cache / embedder_id() / TOKENIZER), list[str]()
    embedder = static_embedder(tmp_path, announced.append)
    made = np.load(tmp_path / embedder.id / TABLE)

    assert (embedder.dimension, announced) == (3, [])
    assert np.array_equal(made, rows * token_weights()[:, None])
    assert np.array_equal(np.load(tmp_path / "static-1" / TABLE), rows)  # for processes of that version
    assert list(tmp_path.glob(".distilling-*")) == []


def test_a_damaged_table_of_an_earlier_version_is_distilled_anew(
    embedder_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    an_earlier_table(tmp_path, embedder_cache / embedder_id() / TOKENIZER)
    (tmp_path / "static-1" / TABLE).write_bytes(b"cut off")
    monkeypatch.setattr(embedding, "DISTILL_COMMAND", "raise SystemExit('there is no model here')")
    announced = list[str]()
    with pytest.raises(InvalidArtifact, match="there is no model here"):
        static_embedder(tmp_path, announced.append)
    assert ["distilling" in message for message in announced] == [True]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is mapped")
def test_processes_share_the_pages_of_the_table(embedder: StaticEmbedder, embedder_cache: Path) -> None:
    embedder.embed(TEXTS)
    maps = Path("/proc/self/maps").read_text("utf-8").splitlines()
    mapped = [line.split()[1] for line in maps if line.endswith(str(embedder_cache / embedder.id / TABLE))]
    assert mapped
    assert {permissions[3] for permissions in mapped} == {"s"}


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_folder_of_any_model_is_an_embedder_with_an_id_of_its_own(tmp_path: Path) -> None:
    named, own = open_embedder(str(model_folder()), tmp_path), open_embedder("transformer", tmp_path)
    assert isinstance(named, TransformerEmbedder)
    assert named.id == f"transformer-{model_folder()}" != own.id
    assert np.array_equal(named.embed(TEXTS), own.embed(TEXTS))
