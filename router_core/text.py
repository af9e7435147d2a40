"""What routing, grading and people need of a text: its size in tokens, its ends, its normal and plain form, times."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final, Literal

BYTES_PER_TOKEN = 4

# Characters that `truncate_middle` keeps from each end.
MAX_END_CHARS = 2_000

_PIECE = re.compile(r"\S{1,200}+|\s++")


def text_bytes(text: str) -> int:
    """Count the UTF-8 bytes of `text`; a lone surrogate counts as one."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def estimate_tokens(text: str) -> int:
    """Estimate the tokens of `text`: a quarter of its bytes, at least one."""
    return max(text_bytes(text) // BYTES_PER_TOKEN, 1)


def truncate_middle(text: str) -> str:
    """Keep the first and the last MAX_END_CHARS characters of a longer text, joined by a line break.

    Blanks around a long text are dropped first. Every text is truncated before it is embedded, when a map is fitted and
    when a request is routed, so that a prompt always has the same vector.
    """
    if len(text) <= 2 * MAX_END_CHARS:
        return text
    stripped = text.strip()
    if len(stripped) <= 2 * MAX_END_CHARS:
        return stripped
    return f"{stripped[:MAX_END_CHARS]}\n{stripped[-MAX_END_CHARS:]}"


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


def rfc3339(unix_s: float, timespec: Literal["seconds", "milliseconds"] = "seconds") -> str:
    """Write a time in UTC, as 2026-01-31T12:00:00Z. Raises ValueError or OverflowError after the year 9999."""
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec=timespec).replace("+00:00", "Z")


# Characters of a name that is compared with others, which takes quadratic time. No known name is as long.
_MAX_COMPARED_CHARS = 200


def closest_name(name: str, known: Iterable[str], min_similarity: float = 0.6) -> str | None:
    """Return the known name that `name` may be a slip of, or None.

    Args:
        min_similarity: 1 for the same letters, 0 for none in common. 0.8 is about one letter in five.
    """
    found = difflib.get_close_matches(name[:_MAX_COMPARED_CHARS], list(known), n=1, cutoff=min_similarity)
    return found[0] if found else None
