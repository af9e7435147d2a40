from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable
from typing import Final, Literal

_PIECE = re.compile(r"\S{1,200}+|\s++")


def normalize(form: Literal["NFC", "NFD", "NFKC", "NFKD"], text: str) -> str:
    """Normalize `text` in pieces of at most 200 characters, in linear time.

    The standard library sorts a run of combining marks by insertion: 20,000 of them take 0.4 s, a million 20 minutes.
    In pieces, a mark may stay apart from its letter where a run without white space is longer than that.
    """
    if text.isascii():
        return text
    return "".join(unicodedata.normalize(form, piece) for piece in _PIECE.findall(text))


_ESCAPE_SEQUENCES: Final = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # CSI: colours, cursor, erasing
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # OSC, DCS…: titles, links, clipboard
    r"|\x1b[ -/]*[0-~]?"
)

_LAYOUT: Final = frozenset("\n\t")

# Controls, invisible and direction-changing characters, half characters, separators of lines.
_INVISIBLE_CATEGORIES: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})

# Within Persian words and emoji; they move nothing.
_JOINERS: Final = frozenset("\u200c\u200d")


def plain(text: str, *, lines: bool = True) -> str:
    """Remove control characters, escape sequences and characters that reorder what is around them.

    Args:
        lines: whether line ends and tabs stay; otherwise each becomes a blank.
    """
    if text.isprintable():
        return text
    return "".join(_plain_letter(letter, lines) for letter in _ESCAPE_SEQUENCES.sub("", text))


def _plain_letter(letter: str, lines: bool) -> str:  # noqa: FBT001
    if letter in _LAYOUT:
        return letter if lines else " "
    if letter.isprintable() or letter in _JOINERS:
        return letter
    return "" if unicodedata.category(letter) in _INVISIBLE_CATEGORIES else letter


# Characters of a name that is compared with others, which takes quadratic time. No known name is as long.
_MAX_COMPARED_CHARS = 200


def closest_name(name: str, known: Iterable[str], min_similarity: float = 0.6) -> str | None:
    """Return the known name that `name` may be a slip of, or None.

    Args:
        min_similarity: 1 for the same letters, 0 for none in common. 0.8 is about one letter in five.
    """
    found = difflib.get_close_matches(name[:_MAX_COMPARED_CHARS], list(known), n=1, cutoff=min_similarity)
    return found[0] if found else None
