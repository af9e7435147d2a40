from __future__ import annotations

import fcntl
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from router_core import distill, kernels, multilingual
from router_core.errors import Interrupted, InvalidArtifact
from router_core.text import closest_name
from router_core.types import Embedder, Floats

# Words whose ids a thread caches, about 2 MiB: so few that no choice of words makes a look-up slow.
MAX_CACHED_WORDS = 8_192

# The library's cache drops no word once it is full, so it is emptied after so many texts.
TEXTS_PER_CACHE = 4_096


class Tokenizer:
    """A WordPiece tokenizer, safe to use from several threads."""

    def __init__(self, description: Path) -> None:
        """
        Args:
            description: a tokenizer.json of WordPiece; its truncation and padding are ignored.

        Raises:
            InvalidArtifact: it is of another kind, damaged, or missing.
        """
        from nanotoken import WordPieceTokenizer, set_cache_entries

        set_cache_entries(MAX_CACHED_WORDS)
        try:
            self._tokenizer = WordPieceTokenizer.from_json(description.read_bytes())
        except (OSError, ValueError) as error:
            folder = description.parent
            raise InvalidArtifact(f"{description} cannot be read: {error}; delete {folder}, it is made again") from None
        self._texts = count(1)

    def ids(self, text: bytes) -> NDArray[np.uint32]:
        """Return the (n,) vocabulary ids of UTF-8 `text`, without special tokens."""
        if next(self._texts) % TEXTS_PER_CACHE == 0:
            self._tokenizer.clear_cache()
        return self._tokenizer.encode(text, add_special_tokens=False)


# Bytes that a UnigramTokenizer splits before it is opened anew, which holds the process up for up to 50 ms. If no word
# comes twice, the library remembers about 70 MB until then.
BYTES_PER_CACHE = 8 << 20


class UnigramTokenizer:
    """A tokenizer of the pieces that `multilingual.distill` wrote, safe to use from several threads."""

    def __init__(self, description: Path) -> None:
        """
        Raises:
            InvalidArtifact: the file is damaged or missing, or the package that reads it is.
        """
        multilingual.require_packages(multilingual.SPLITTER)
        self._description = description
        self._tokenizer = self._open()
        self._split = 0

    def ids(self, text: bytes) -> NDArray[np.uint32]:
        """Return the (n,) ids of UTF-8 `text`; 0 stands for what no piece covers."""
        self._split += len(text)
        if self._split > BYTES_PER_CACHE:
            # The library remembers the words that it has split and drops none of them.
            self._split, self._tokenizer = 0, self._open()
        words = text.split()
        if not words:
            return np.empty(0, dtype=np.uint32)
        return np.array(self._tokenizer.encode_bytes(_WORD_START + _WORD_START.join(words)), dtype=np.uint32)

    def _open(self) -> Any:
        from tokie import Tokenizer as Splitter
        from tokie import TokieError

        try:
            return Splitter.from_file(str(self._description))
        except (OSError, ValueError, TokieError) as error:
            folder = self._description.parent
            raise InvalidArtifact(
                f"{self._description} cannot be read: {error}; delete {folder}, it is made again"
            ) from None


_WORD_START = multilingual.WORD_START.encode()


class TokenSplitter(Protocol):
    def ids(self, text: bytes) -> NDArray[np.uint32]: ...


@dataclass(frozen=True)
class StaticKind:
    """One of the static embedders."""

    module: str
    """Its `distill` writes the folder of the table."""
    embedder_id: Callable[[], str]
    tokenizer: Callable[[Path], TokenSplitter]
    """Opens the tokenizer of such a folder."""
    teacher: str
    time_to_make: str


STATIC_KINDS: Mapping[str, StaticKind] = {
    "static": StaticKind(
        "router_core.distill",
        distill.embedder_id,
        lambda folder: Tokenizer(folder / distill.TOKENIZER),
        "all-MiniLM-L6-v2",
        "20 s",
    ),
    "multilingual": StaticKind(
        "router_core.multilingual",
        multilingual.embedder_id,
        lambda folder: UnigramTokenizer(folder / multilingual.TOKENIZER),
        "multilingual-e5-small",
        "three minutes of CPU",
    ),
}

DISTILL_COMMAND = (
    "import functools, importlib, pathlib, sys; distill = importlib.import_module(sys.argv[2]).distill; "
    "distill(pathlib.Path(sys.argv[1]), progress=functools.partial(print, flush=True))"
)

# Longest text that is embedded inline: about a millisecond in the slowest script, and more than routing reads of an
# English request.
MAX_INLINE_BYTES = 10_000

POLL_INTERVAL_S = 0.1

SCRATCH_PREFIX = ".distilling-"

# Those that need no name of a model.
EMBEDDERS = (*STATIC_KINDS, "transformer")

MODEL_FILES = ("modules.json", "config.json")


class StaticEmbedder:
    """Embeds a text as the weighted mean of its token vectors. Processes share one memory-mapped table."""

    def __init__(self, table: Floats, tokenizer: TokenSplitter, embedder_id: str) -> None:
        """
        Args:
            table: (V, d) float32, one weighted row per vocabulary token.
            tokenizer: of that vocabulary.
        """
        # Still memory-mapped, without the overhead of np.memmap's subclass.
        rows = np.asarray(table)
        self.id = embedder_id
        self.dimension = int(rows.shape[1])
        self._table = kernels.current().token_table(rows)
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path, kind: StaticKind = STATIC_KINDS["static"]) -> StaticEmbedder:
        """Open a folder that the kind's `distill` wrote. This does not load torch."""
        table = np.load(folder / distill.TABLE, mmap_mode="r", allow_pickle=False)
        return cls(table, kind.tokenizer(folder), kind.embedder_id())

    def embed(self, texts: Sequence[str]) -> Floats:
        """Return (n, d) float32, rows of unit length; a text without any token gives a zero row."""
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        for row, text in enumerate(texts):
            self._table.embed(self._tokenizer.ids(_utf8(text)), vectors[row : row + 1])
        return vectors

    def embed_if_short(self, text: str, out: Floats | None = None) -> Floats | None:
        """Return the (1, d) vector that `embed` gives; None if it would take more than about a millisecond.

        Args:
            out: (1, d) to write it to.
        """
        encoded = _utf8(text)
        if len(encoded) > MAX_INLINE_BYTES:
            return None
        vector = np.empty((1, self.dimension), dtype=np.float32) if out is None else out
        self._table.embed(self._tokenizer.ids(encoded), vector)
        return vector


class TransformerEmbedder:
    """A sentence-transformers model; all-MiniLM-L6-v2 from the installed package unless another is named."""

    def __init__(self, name: str | None = None) -> None:
        """
        Args:
            name: a folder, or a model of the hub that was downloaded before. Nothing is downloaded, no remote code run.
        """
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
        """Return (n, d) float32, rows of unit length; a blank text gives a zero row."""
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
    *,
    name: str = "static",
) -> StaticEmbedder:
    """Open a static embedder in `cache_dir`, making its table first if it is missing.

    It is distilled, or taken from a table of an earlier version, which had no weights yet.

    Args:
        cache_dir: one per machine is enough; every version of the table has a folder of its own.
        announce: called once, before distilling begins, which takes seconds or minutes.
        progress: called with the tokens distilled and their total, also while another process distils.
        stop: set it to give up.
        name: one of STATIC_KINDS.

    Raises:
        InvalidArtifact: distilling failed; the message ends with what it printed last.
        Interrupted: `stop` was set.
    """
    kind = STATIC_KINDS[name]
    folder = cache_dir / kind.embedder_id()
    unweighted = cache_dir / f"static-{distill.TABLE_VERSION}"
    if not (folder / distill.TABLE).exists():
        stop = stop or threading.Event()
        # One lock for all kinds: its holder removes what is left of others.
        with _exclusive(cache_dir / f".{unweighted.name}.lock", progress, stop) as lock:
            made = (folder / distill.TABLE).exists() or (name == "static" and _weighed(unweighted, folder))
            if not made:
                announce(f"distilling the embedding table from {kind.teacher} (once, about {kind.time_to_make})")
                _distill_in_process(folder, partial(_publish, lock, progress), stop, kind.module)
    return StaticEmbedder.load(folder, kind)


def open_embedder(
    kind: str,
    cache_dir: Path,
    announce: Callable[[str], None] = lambda _message: None,
    progress: distill.Progress = lambda _done, _total: None,
    stop: threading.Event | None = None,
) -> Embedder:
    """Open an embedder by its kind. Nothing is downloaded.

    Args:
        kind: one of EMBEDDERS, the folder of a sentence-transformers model, or the name of a downloaded one.

    Raises:
        InvalidArtifact: there is no such model on this machine.
        Interrupted: `stop` was set before the table was distilled.
    """
    check_embedder(kind)
    if kind in STATIC_KINDS:
        return static_embedder(cache_dir, announce, progress, stop, name=kind)
    return TransformerEmbedder(None if kind == "transformer" else kind)


def check_embedder(name: str) -> None:
    """Raise InvalidArtifact if there is no embedder of this name. This does not import torch, which takes seconds."""
    if name == "multilingual":
        multilingual.require_packages(multilingual.SPLITTER)
    if name in EMBEDDERS:
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
        except ValueError:  # not a valid name
            continue
    closest = closest_name(name, EMBEDDERS)
    hint = f"did you mean {closest!r}?" if closest else f"download it first: `hf download {name}`"
    raise InvalidArtifact(
        f"no model {name!r} is on this machine: give {', '.join(EMBEDDERS)}, a folder, or a model of the hub that"
        f" was downloaded; {hint}"
    )


@contextmanager
def _exclusive(path: Path, progress: distill.Progress, stop: threading.Event) -> Iterator[IO[str]]:
    """Hold the lock on `path`. Its holder writes its progress into the file, which those who wait report."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("a+") as lock:
        while not _locked(lock):
            lock.seek(0)
            _report(lock.read(), progress)
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


def _publish(lock: IO[str], progress: distill.Progress, done: int, total: int) -> None:
    """Report progress here and, through the lock file, to the processes that wait."""
    lock.truncate(0)
    lock.write(f"{done} {total}")
    lock.flush()
    progress(done, total)


def _report(line: str, progress: distill.Progress) -> None:
    """Report a line of "done total"; other lines are a library's messages, and ignored."""
    numbers = line.split()
    if len(numbers) == 2 and line.replace(" ", "").strip().isdecimal():
        progress(int(numbers[0]), int(numbers[1]))


def _weighed(unweighted: Path, folder: Path) -> bool:
    """Make `folder` from a table of an earlier version, if there is one that can be read."""
    if not (unweighted / distill.TABLE).exists():
        return False
    with _scratch(folder) as scratch:
        try:
            distill.weigh(unweighted, scratch / folder.name)
        except (OSError, ValueError, InvalidArtifact):
            return False  # damaged: it is distilled anew
        (scratch / folder.name).rename(folder)
    return True


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Make a folder beside `folder`, and remove it in the end. Those of killed processes are removed first."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Left by processes that were killed: only the holder of the lock makes a table.
    for leftover in folder.parent.glob(f"{SCRATCH_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=SCRATCH_PREFIX) as scratch:
        yield Path(scratch)


def _distill_in_process(
    folder: Path,
    progress: distill.Progress,
    stop: threading.Event | None = None,
    module: str = STATIC_KINDS["static"].module,
) -> None:
    """Distil in a child process, so that a server never loads torch. The child ends if nothing reads its output."""
    stop = stop or threading.Event()
    with _scratch(folder) as scratch:
        distilled = scratch / folder.name
        error_log = scratch / "errors"
        with error_log.open("w") as errors:
            command = [sys.executable, "-c", DISTILL_COMMAND, str(distilled), module]
            with subprocess.Popen(  # noqa: S603
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the child
            ) as child:
                try:
                    for line in _lines(child, stop):
                        _report(line, progress)
                except BaseException:
                    child.kill()
                    raise
        if child.returncode:
            reason = error_log.read_text("utf-8", "replace").strip() or "killed"
            raise InvalidArtifact(f"the embedding table could not be made: {reason[-500:]}")
        try:
            distilled.rename(folder)
        except OSError:
            if not (folder / distill.TABLE).exists():
                raise


def _lines(child: subprocess.Popen[bytes], stop: threading.Event) -> Iterator[str]:
    """Yield the lines that the child prints, until it ends. Raises Interrupted soon after `stop` was set."""
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
    """Encode `text`; lone surrogates, which are legal in JSON, become question marks."""
    return text.encode("utf-8", "replace")


def _unit(vectors: Floats) -> Floats:
    norms = np.sqrt(np.add.reduce(vectors * vectors, axis=1, keepdims=True))
    return np.asarray(np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0), dtype=np.float32)
