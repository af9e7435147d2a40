from __future__ import annotations

import difflib
import fcntl
import hashlib
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from router_core import distill
from router_core.errors import Interrupted, InvalidArtifact
from router_core.types import Embedder, Floats

MAX_WORDS = 8_192
"""Whose ids a thread remembers: about 2 MiB. So few that no choice of words can make looking one up slow."""

TEXTS_REMEMBERED = 4_096
"""The library forgets no word when its memory is full; after so many texts it begins again, with the words of today."""


class Tokenizer:
    """Used from several threads."""

    def __init__(self, description: Path) -> None:
        """`description`: a tokenizer.json of WordPiece; its truncation and padding are left out.

        Raises:
            InvalidArtifact: it is of another kind, damaged, or not there.
        """
        from nanotoken import WordPieceTokenizer, set_cache_entries

        set_cache_entries(MAX_WORDS)
        try:
            self._tokenizer = WordPieceTokenizer.from_json(description.read_bytes())
        except (OSError, ValueError) as error:
            folder = description.parent
            raise InvalidArtifact(f"{description} cannot be read: {error}; delete {folder}, it is made again") from None
        self._texts = count(1)

    def ids(self, text: bytes) -> NDArray[np.uint32]:
        """(n,), special tokens not added. `text` is UTF-8."""
        if next(self._texts) % TEXTS_REMEMBERED == 0:
            self._tokenizer.clear_cache()
        return self._tokenizer.encode(text, add_special_tokens=False)


DISTILL_COMMAND = (
    "import functools, pathlib, sys; from router_core.distill import distill; "
    "distill(pathlib.Path(sys.argv[1]), progress=functools.partial(print, flush=True))"
)

MAX_INLINE_BYTES = 10_000
"""Bytes: about a millisecond in the slowest of scripts, and more than routing reads of an English request."""

BATCH_ROWS = 256
"""Of the table, so that what is copied out of it stays in a core's own cache: half the time for 3,000 tokens."""

POLL_INTERVAL_S = 0.1

SCRATCH = ".distilling-"

MODEL_FILES = ("modules.json", "config.json")

TOKEN_WEIGHTS = Path(__file__).parent / "assets" / "token_weights.npy"


class StaticEmbedder:
    """The weighted mean of a prompt's token vectors. The table is memory-mapped: processes share one copy of it."""

    def __init__(self, table: Floats, token_weights: Floats, tokenizer: Tokenizer) -> None:
        """
        Args:
            table: (V, d) float32, one row per vocabulary token.
            token_weights: (V,) float32; frequent tokens weigh little (smooth inverse frequency, Arora et al. 2017).
            tokenizer: of that vocabulary.
        """
        if len(table) != len(token_weights):
            raise InvalidArtifact(f"the token table has {len(table)} rows but there are {len(token_weights)} weights")
        self._table = np.asarray(table)  # still mapped, and without what a subclass of arrays costs
        self._weights = token_weights
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path, token_weights: Path = TOKEN_WEIGHTS) -> StaticEmbedder:
        """Open a folder that `distill` wrote. No torch is loaded."""
        table = np.load(folder / distill.TABLE, mmap_mode="r", allow_pickle=False)
        weights = np.load(token_weights, allow_pickle=False)
        return cls(table, weights, Tokenizer(folder / distill.TOKENIZER))

    @cached_property
    def id(self) -> str:
        return f"static-{distill.RECIPE}-{hashlib.sha256(self._weights.tobytes()).hexdigest()[:12]}"

    @property
    def dimension(self) -> int:
        return int(self._table.shape[1])

    def tokens(self, text: str) -> list[int]:
        """Vocabulary ids of `text`, without the model's special tokens."""
        ids: list[int] = self._tokenizer.ids(_utf8(text)).tolist()
        return ids

    def embed(self, texts: Sequence[str]) -> Floats:
        """(n, d) float32 of unit length; a text without any token gives a zero row."""
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for row, text in enumerate(texts):
            vectors[row] = self._vector(_utf8(text))
        return vectors

    def embed_if_short(self, text: str) -> Floats | None:
        """(1, d), the same as `embed` gives, in about a millisecond at most. None: it would take longer."""
        encoded = _utf8(text)
        return None if len(encoded) > MAX_INLINE_BYTES else self._vector(encoded).reshape(1, -1)

    def _vector(self, text: bytes) -> Floats:
        """(d,), of unit length or zeros."""
        ids = self._tokenizer.ids(text)
        vector = np.zeros(self.dimension, dtype=np.float32)
        for start in range(0, ids.size, BATCH_ROWS):
            some = ids[start : start + BATCH_ROWS]
            vector += self._weights.take(some) @ self._table.take(some, axis=0)
        norm = np.sqrt(np.add.reduce(vector * vector))
        return np.asarray(vector / norm if norm > 0 else vector, dtype=np.float32)


class TransformerEmbedder:
    """A sentence-transformers model; all-MiniLM-L6-v2 from the installed package unless another is named."""

    def __init__(self, name: str | None = None) -> None:
        """`name` is a folder, or a model of the hub that was downloaded before. No network, and no remote code."""
        self._name = name
        self.id = f"transformer-{name or 'all-MiniLM-L6-v2'}"

    @cached_property
    def _model(self) -> Any:
        from sentence_transformers import SentenceTransformer

        folder = self._name or str(distill.model_folder())
        return SentenceTransformer(folder, device="cpu", trust_remote_code=False, local_files_only=True)

    @property
    def dimension(self) -> int:
        return int(self._model.get_sentence_embedding_dimension())

    def embed(self, texts: Sequence[str]) -> Floats:
        """(n, d) float32 of unit length; a text of white space gives a zero row."""
        vectors = self._model.encode(
            [_utf8(text).decode() for text in texts], convert_to_numpy=True, show_progress_bar=False
        )
        blank = [row for row, text in enumerate(texts) if not text.strip()]
        vectors[blank] = 0.0
        return _unit(np.asarray(vectors, dtype=np.float32))


def static_embedder(
    cache_dir: Path,
    announce: Callable[[str], None] = lambda _message: None,
    progress: distill.Progress = lambda _done, _total: None,
    stop: threading.Event | None = None,
) -> StaticEmbedder:
    """Open the static embedder in `cache_dir`, distilling it first where it is missing.

    Args:
        cache_dir: one per machine is enough; every version of the recipe has a folder of its own.
        announce: told once, before the only step that takes seconds.
        progress: told of that step, how many tokens are done and of how many, also where another process takes it.
        stop: set by whoever does not want it any more.

    Raises:
        InvalidArtifact: distilling failed; the message ends with what it printed last.
        Interrupted: `stop` was set.
    """
    folder = cache_dir / f"static-{distill.RECIPE}"
    if not (folder / distill.TABLE).exists():
        stop = stop or threading.Event()
        with _alone(cache_dir / f".{folder.name}.lock", progress, stop) as lock:
            if not (folder / distill.TABLE).exists():
                announce("distilling the embedding table from all-MiniLM-L6-v2 (once, about 20 s)")
                _distill_apart(folder, partial(_told_to_all, lock, progress), stop)
    return StaticEmbedder.load(folder)


def open_embedder(
    kind: str,
    cache_dir: Path,
    announce: Callable[[str], None] = lambda _message: None,
    progress: distill.Progress = lambda _done, _total: None,
    stop: threading.Event | None = None,
) -> Embedder:
    """`static`, `transformer`, the folder of a sentence-transformers model, or the name of one that was downloaded.

    Raises:
        InvalidArtifact: there is no such model on this machine; nothing is downloaded.
        Interrupted: `stop` was set before the table was made.
    """
    check_embedder(kind)
    if kind == "static":
        return static_embedder(cache_dir, announce, progress, stop)
    return TransformerEmbedder(None if kind == "transformer" else kind)


def check_embedder(name: str) -> None:
    """Whether there is one of this name, said before torch is imported, which takes seconds. Raises InvalidArtifact."""
    if name in ("static", "transformer"):
        return
    if Path(name).is_dir():
        if not any((Path(name) / file).exists() for file in MODEL_FILES):
            raise InvalidArtifact(f"the folder {name} holds no sentence-transformers model ({MODEL_FILES[0]})")
        return
    from huggingface_hub import try_to_load_from_cache

    for repository in (name, f"sentence-transformers/{name}"):
        try:
            if any(isinstance(try_to_load_from_cache(repository, file), str) for file in MODEL_FILES):
                return
        except ValueError:  # it cannot be a name
            continue
    near = difflib.get_close_matches(name, ("static", "transformer"), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"download it first: `hf download {name}`"
    raise InvalidArtifact(
        f"no model {name!r} is on this machine: give static, transformer, a folder, or a model of the hub that was"
        f" downloaded; {hint}"
    )


@contextmanager
def _alone(path: Path, progress: distill.Progress, stop: threading.Event) -> Iterator[IO[str]]:
    """Hold the lock on `path`, in which its holder writes how far it is."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("a+") as lock:
        while not _locked(lock):
            lock.seek(0)
            _tell(lock.read(), progress)
            if stop.wait(POLL_INTERVAL_S):
                raise Interrupted("the embedding table is not waited for any more")
        yield lock
        lock.truncate(0)


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _told_to_all(lock: IO[str], progress: distill.Progress, done: int, total: int) -> None:
    lock.truncate(0)
    lock.write(f"{done} {total}")
    lock.flush()
    progress(done, total)


def _tell(line: str, progress: distill.Progress) -> None:
    told = line.split()
    if len(told) == 2 and line.replace(" ", "").strip().isdecimal():  # else a library's own words
        progress(int(told[0]), int(told[1]))


def _distill_apart(folder: Path, progress: distill.Progress, stop: threading.Event | None = None) -> None:
    """In a process of its own, so that torch never lives in a server. It ends with us: it finds that nobody reads."""
    stop = stop or threading.Event()
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{SCRATCH}*"):  # by a process that was killed: who distils is alone
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=SCRATCH) as scratch:
        made = Path(scratch) / folder.name
        said = Path(scratch) / "said"
        with said.open("w") as errors:
            command = [sys.executable, "-c", DISTILL_COMMAND, str(made)]
            with subprocess.Popen(  # noqa: S603
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # Ctrl-C is for us, who then end it
            ) as child:
                try:
                    for line in _lines(child, stop):
                        _tell(line, progress)
                except BaseException:
                    child.kill()
                    raise
        if child.returncode:
            reason = said.read_text("utf-8", "replace").strip() or "killed"
            raise InvalidArtifact(f"the embedding table could not be made: {reason[-500:]}")
        try:
            made.rename(folder)
        except OSError:
            if not (folder / distill.TABLE).exists():
                raise


def _lines(child: subprocess.Popen[bytes], stop: threading.Event) -> Iterator[str]:
    """What it prints, until it ends. Raises Interrupted soon after `stop` was set."""
    assert child.stdout is not None
    pending = b""
    while not stop.is_set():
        if not select.select([child.stdout], [], [], POLL_INTERVAL_S)[0]:
            continue
        data = os.read(child.stdout.fileno(), 4096)
        if not data:
            return
        *lines, pending = (pending + data).split(b"\n")
        yield from (line.decode("utf-8", "replace") for line in lines)
    raise Interrupted("the embedding table is not made any more")


def _utf8(text: str) -> bytes:
    """Lone surrogates, legal in JSON, cannot be encoded: they become question marks."""
    return text.encode("utf-8", "replace")


def _unit(vectors: Floats) -> Floats:
    norms = np.sqrt(np.add.reduce(vectors * vectors, axis=1, keepdims=True))
    return np.asarray(np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0), dtype=np.float32)
