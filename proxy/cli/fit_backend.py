from __future__ import annotations

import gzip
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from proxy.cli.console import BadArgument, Progress, load_embedder, require_readable
from router_core.clustering import ClusterMap
from router_core.documents import MAX_LINE_BYTES, DocumentTooLarge, parse_json
from router_core.evaluation.outcomes import parse_row, read_rows
from router_core.fitting import EmbeddedPrompts, PromptSample, batches, count_nearest, embed_prompts, sample_prompts
from router_core.text import truncate_middle
from router_core.types import Doubles, Embedder, Indices

_PARQUET_ROWS = 1024

_PARQUET_BUFFER = 1 << 20

_FIELDS = ("prompt", "messages")

_NEEDS = 'needs "prompt" (text) or "messages" (a list of chat messages)'


def check_prompt_files(paths: Iterable[Path]) -> None:
    """Check that all of them can be read, before any is. Raises BadArgument."""
    for path in paths:
        require_readable(path, "PROMPTS")
        if _reader(path) is _parquet and find_spec("pyarrow") is None:
            raise BadArgument(f"{path}: reading Parquet needs pyarrow; pip install 'uniroute[parquet]'")


def read_prompts(paths: Iterable[Path]) -> Iterator[str]:
    """Yield one text a line of a text file, and of JSONL and Parquet the "prompt" or the user turns of the "messages".

    A text that is too long to be routed by the whole of it is cut as routing cuts it.
    """
    for path in paths:
        try:
            yield from map(truncate_middle, _reader(path)(path))
        except OSError as error:
            raise BadArgument(f"{path}: cannot be read ({error.strerror or error})") from None
        except (EOFError, zlib.error):
            raise BadArgument(f"{path}: its compressed data is broken or cut off; make the file again") from None
        except UnicodeDecodeError:
            raise BadArgument(f"{path}: is not UTF-8 text") from None


def _reader(path: Path) -> Callable[[Path], Iterator[str]]:
    if path.suffix == ".parquet":
        return _parquet
    return _jsonl if path.name.removesuffix(".gz").endswith((".jsonl", ".ndjson")) else _text


def _lines(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_BYTES), ""), 1):
            if len(line) == MAX_LINE_BYTES:
                raise BadArgument(f"{path}, line {number}: is longer than {MAX_LINE_BYTES:,} characters")
            yield line


def _text(path: Path) -> Iterator[str]:
    return (line.strip() for line in _lines(path) if line.strip())


def _jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            text = _prompt_of(parse_json(line))
        except DocumentTooLarge as error:
            raise BadArgument(f"{path}, line {number}: {error}") from None
        except ValueError as error:
            raise BadArgument(f"{path}, line {number}: is not JSON ({error})") from None
        if text is None:
            raise BadArgument(f"{path}, line {number}: {_NEEDS}")
        yield text


def _parquet(path: Path) -> Iterator[str]:
    for number, row in enumerate(_parquet_rows(path), 1):
        text = _prompt_of(row)
        if text is None:
            raise BadArgument(f"{path}, row {number}: {_NEEDS}")
        yield text


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows with the columns that are needed, holding one buffer of each in memory."""
    from pyarrow.lib import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path, buffer_size=_PARQUET_BUFFER, pre_buffer=False) as file:
            columns = [name for name in _FIELDS if name in file.schema_arrow.names]
            if not columns:
                found = ", ".join(file.schema_arrow.names) or "none"
                raise BadArgument(f"{path}: {_NEEDS} as a column; it has {found}")
            for batch in file.iter_batches(_PARQUET_ROWS, columns=columns, use_threads=False):
                yield from batch.to_pylist()
    except ArrowException as error:
        raise BadArgument(f"{path}: is not a Parquet file that can be read ({error})") from None


def _prompt_of(row: Any) -> str | None:
    if not isinstance(row, dict):
        return None
    if isinstance(row.get("prompt"), str):
        return str(row["prompt"])
    messages = row.get("messages")
    if not isinstance(messages, list):
        return None
    users = [m["content"] for m in messages if isinstance(m, dict) and m.get("role") == "user"]
    return "\n".join(content for content in users if isinstance(content, str)) or None


PROGRESS_INTERVAL = 10_000  # prompts


@dataclass(frozen=True, slots=True)
class FitPlan:
    """What to fit a cluster map to, and how."""

    paths: Sequence[Path]
    clusters: int
    seed: int
    embedder: str
    data_dir: Path


class FitBackend(Protocol):
    """Where the work of fitting is done. Every backend gives the same map."""

    def sample(self) -> PromptSample: ...

    def embed(self, prompts: Sequence[str]) -> EmbeddedPrompts: ...

    def count(self, fitted: ClusterMap) -> Indices:
        """Return (K,): how many of all prompts lie nearest to each cluster."""


class LocalBackend:
    """Fit in this process, one step after the other."""

    def __init__(self, plan: FitPlan, bars: Progress) -> None:
        self._plan = plan
        self._bars = bars

    def sample(self) -> PromptSample:
        return sample_prompts(self._read("reading"), self._plan.clusters, seed=self._plan.seed)

    def embed(self, prompts: Sequence[str]) -> EmbeddedPrompts:
        vectors = embed_prompts(prompts, self._embedder, self._bars.update)
        return EmbeddedPrompts(prompts, vectors, self._embedder.id)

    def count(self, fitted: ClusterMap) -> Indices:
        hard = fitted.with_hard_assignment()
        counts = np.zeros(hard.size, dtype=np.int64)
        for batch in batches(self._read("counting")):
            counts += count_nearest(batch, self._embedder, hard)
        return counts

    @cached_property
    def _embedder(self) -> Embedder:
        return load_embedder(self._plan.embedder, self._plan.data_dir)

    def _read(self, label: str) -> Iterator[str]:
        return with_progress(read_prompts(self._plan.paths), label, self._bars)


class ProgressRate:
    """Show how many prompts are done, and how many a second, on a bar without a known end."""

    def __init__(self, label: str, bars: Progress) -> None:
        self._label = label
        self._bars = bars
        self._started = time.monotonic()

    def update(self, done: int, *, all_done: bool = False) -> None:
        per_second = done / max(time.monotonic() - self._started, 1e-3)
        self._bars.update(self._label, done, done if all_done else 0, f"{per_second:,.0f}/s")


def with_progress(texts: Iterable[str], label: str, bars: Progress) -> Iterator[str]:
    """Yield the texts, and show on a bar how many they are."""
    rate, done = ProgressRate(label, bars), 0
    for done, text in enumerate(texts, 1):
        yield text
        if done % PROGRESS_INTERVAL == 0:
            rate.update(done)
    rate.update(done, all_done=True)


@dataclass(frozen=True, eq=False)
class OutcomeModels:
    models: tuple[str, ...]
    """R names, sorted."""
    scores: Doubles
    """(n, R) in [0, 1] of n prompts, NaN where unlabelled."""


def outcome_models(outcomes: Path | None, prompts: Sequence[str]) -> OutcomeModels:
    """Read the scores of these prompts from an outcomes file; several of one model on one prompt become their mean.

    Args:
        prompts: as prompt files are read.

    Raises:
        InvalidOutcomes: naming the line and the fix.
    """
    rows = {prompt: row for row, prompt in enumerate(prompts)}
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for where, line in read_rows(outcomes) if outcomes else ():
        scored = parse_row(where, line)
        row = rows.get(truncate_middle(scored.prompt))
        if row is not None:
            for model, score in scored.scores.items():
                found[model].append((row, score))
    models = tuple(sorted(found))
    scores = np.empty((len(prompts), len(models)))
    for column, model in enumerate(models):
        scores[:, column] = _means(found[model], len(prompts))
    return OutcomeModels(models, scores)


def _means(scored: Sequence[tuple[int, float]], prompts: int) -> Doubles:
    """Return (prompts,): the mean score of each row, NaN for rows without one."""
    rows, scores = np.array([row for row, _ in scored]), np.array([score for _, score in scored])
    counts = np.bincount(rows, minlength=prompts)
    sums = np.bincount(rows, weights=scores, minlength=prompts)
    return np.asarray(np.divide(sums, counts, out=np.full(prompts, np.nan), where=counts > 0))
