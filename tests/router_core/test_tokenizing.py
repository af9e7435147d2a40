"""Remembered words change no id: compared with the tokenizer itself, on texts of every kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from router_core import distill, tokenizing
from router_core.tokenizing import WordTokenizer
from router_core.word_pieces import word_pieces
from tests.bench.prompts import generated_prompts

ODD = [
    "",
    " \n\t ",
    "Sort a list, please! (in Python3.12?)",
    "a\x00b c\x1cd e\x7ff",
    "no\u00a0break \u2028 line \u0085 end",
    "caf\u00e9 cafe\u0301 \u0130stanbul \u03a3\u03c2",
    "\u8461\u8404\u7259 is \u4e2d\u6587mixed",
    "[MASK] and [CLS]inside[SEP] [UNK] [PAD][not]",
    "\u738b\u82b3\u8bf4\uff1a\u201c3\u670820\u65e5\uff0c\u4e09\u3002\u201d",
    "\u300a\u7ea2\u697c\u68a6\u300b",
    "1\u518a6\u5186\u306e\u30ce\u30fc\u30c8\u309279\u518a\u8cb7\u3044\u307e\u3057\u305f\u3002",
    "\u4e2d\u0301\u4e2d\x00\u4e2de\u0301\u4e2d",
    "\U0001f642\U0001f642 \u200b zero\u200dwidth \ufeff",
    "a" * 200 + " " + "b" * 32 + " " + "c" * 33,
    "x" * 101 + "," + "word" * 40,
]
PIECES = st.sampled_from(
    [
        "[MASK]",
        "word",
        "Word",
        "ing",
        " ",
        "\n",
        ",",
        "[",
        "]",
        "\x00",
        "\u0301",
        "\u4e2d",
        "12.5",
        "\u6587",
        "\uff0c",
        "\u3002",
        "\u306e",
        "\u00e9",
        "\uf900",
        "\U00020000",
        "\u2018",
        "\u3000",
    ]
)


@pytest.fixture(scope="module")
def tokenizer(embedder_cache: Path) -> Tokenizer:
    opened = Tokenizer.from_file(str(embedder_cache / f"static-{distill.RECIPE}" / distill.TOKENIZER))
    opened.no_truncation()
    opened.no_padding()
    return opened


@pytest.fixture(scope="module")
def words(tokenizer: Tokenizer) -> WordTokenizer:
    return WordTokenizer(tokenizer)


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_have_the_same_ids(tokenizer: Tokenizer, words: WordTokenizer, text: str) -> None:
    assert words.ids(text) == words.ids(text) == plain(tokenizer, text)


@given(text=st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=20).map("".join)))
def test_any_text_has_the_same_ids(tokenizer: Tokenizer, words: WordTokenizer, text: str) -> None:
    encodable = text.encode("utf-8", "replace").decode()
    assert words.ids(encodable) == plain(tokenizer, encodable)


def test_forgetting_old_words_changes_nothing(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "MOST_WORDS", 50)
    few = WordTokenizer(tokenizer)
    for text in generated_prompts(200):
        assert few.ids(text) == plain(tokenizer, text)
    assert len(few._young) <= 51
    assert len(few._old) <= 51


def test_words_that_come_once_push_out_none_that_come_again(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "MOST_WORDS", 50)
    monkeypatch.setattr(tokenizing, "MOST_MET_ONCE", 20)
    few = WordTokenizer(tokenizer)
    for _ in range(2):
        few.ids("said again")
    for number in range(500):
        few.ids(f"said{number}once")

    assert set(few._young) == {"said", "again"}
    assert len(few._once) <= 21


@given(word=st.text(st.sampled_from("aeinrstXYZ019zq"), min_size=1, max_size=110))
def test_plain_words_fall_into_the_same_pieces(tokenizer: Tokenizer, word: str) -> None:
    pieces_of = word_pieces(tokenizer)

    assert pieces_of is not None
    assert np.frombuffer(pieces_of(word), np.int64).tolist() == plain(tokenizer, word)


def test_a_tokenizer_of_another_kind_is_asked_itself() -> None:
    assert word_pieces(Tokenizer(models.BPE())) is None
