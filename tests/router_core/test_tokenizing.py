from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random
from unicodedata import category

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from router_core import distill, embedding
from router_core.embedding import Tokenizer
from router_core.errors import InvalidArtifact
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


WORDS = st.text(st.sampled_from("aeinrstXYZ019zq\u00e9\u4e2d\u306e-_'"), min_size=1, max_size=110)


@pytest.fixture(scope="module")
def description(embedder_cache: Path) -> Path:
    return embedder_cache / distill.embedder_id() / distill.TOKENIZER


@pytest.fixture(scope="module")
def reference(description: Path) -> tokenizers.Tokenizer:
    opened = tokenizers.Tokenizer.from_file(str(description))
    opened.no_truncation()
    opened.no_padding()
    return opened


@pytest.fixture(scope="module")
def tokenizer(description: Path) -> Tokenizer:
    return Tokenizer(description)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    found: list[int] = tokenizer.ids(text.encode()).tolist()
    return found


def expected(reference: tokenizers.Tokenizer, text: str) -> list[int]:
    found: list[int] = reference.encode(text, add_special_tokens=False).ids
    return found


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_have_the_same_ids(reference: tokenizers.Tokenizer, tokenizer: Tokenizer, text: str) -> None:
    for _ in range(2):  # looked up, and remembered
        assert ids(tokenizer, text) == expected(reference, text)


@given(text=st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=20).map("".join), WORDS))
def test_any_text_has_the_same_ids(reference: tokenizers.Tokenizer, tokenizer: Tokenizer, text: str) -> None:
    encodable = text.encode("utf-8", "replace").decode()
    assert ids(tokenizer, encodable) == expected(reference, encodable)


def test_every_character_has_the_same_ids(reference: tokenizers.Tokenizer, tokenizer: Tokenizer) -> None:
    """Of characters that Unicode has not assigned, or left to private use, one in forty stands for all."""
    characters = [
        chr(code) for code in range(0x110000) if category(chr(code)) not in {"Cs", "Cn", "Co"} or not code % 40
    ]
    characters = [character for character in characters if category(character) != "Cs"]
    Random(1).shuffle(characters)
    for start in range(0, len(characters), 5_000):
        few = characters[start : start + 5_000]
        text = " ".join(few) + "".join(few) + "".join(f" a{character}b" for character in few)
        assert ids(tokenizer, text) == expected(reference, text)


def test_ids_do_not_depend_on_the_size_of_the_cache(
    reference: tokenizers.Tokenizer, description: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "TEXTS_PER_CACHE", 7)
    forgetful = Tokenizer(description)
    for text in generated_prompts(200):
        assert ids(forgetful, text) == expected(reference, text)


def test_the_cache_is_emptied_after_so_many_texts(description: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "TEXTS_PER_CACHE", 7)
    forgetful, encoded_texts, forgotten = Tokenizer(description), list[bytes](), list[int]()

    class RecordingTokenizer:
        def encode(self, text: bytes, **_: object) -> None:
            encoded_texts.append(text)

        def clear_cache(self) -> None:
            forgotten.append(len(encoded_texts))

    monkeypatch.setattr(forgetful, "_tokenizer", RecordingTokenizer())
    for _ in range(21):
        forgetful.ids(b"word")
    assert forgotten == [6, 13, 20]


def test_words_that_occur_once_take_no_memory(description: Path) -> None:
    code = (
        "import sys, pathlib, resource\n"
        "from router_core.embedding import Tokenizer\n"
        "tokenizer = Tokenizer(pathlib.Path(sys.argv[1]))\n"
        "def most(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "tokenizer.ids(b'warm'); before = most()\n"
        "for start in range(0, 1_500_000, 500):\n"
        "    tokenizer.ids(' '.join(f'w{n}x' for n in range(start, start + 500)).encode())\n"
        "print(most() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, description], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 8_192  # KiB


@pytest.mark.parametrize("damage", ["", "{}", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'])
def test_a_damaged_tokenizer_file_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "tokenizer.json").write_text(damage)
    with pytest.raises(InvalidArtifact, match=rf"tokenizer\.json cannot be read: .*; delete {tmp_path}"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_a_missing_tokenizer_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArtifact, match=r"tokenizer\.json cannot be read: .*No such file"):
        Tokenizer(tmp_path / "tokenizer.json")
