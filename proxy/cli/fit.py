from __future__ import annotations

import gzip
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import numpy as np
import typer

from proxy.cli.console import BadArgument, Progress, opened_embedder, readable
from proxy.cli.options import DataDirOption, JsonOption
from router_core.clustering import ClusterMap
from router_core.documents import MAX_LINE_BYTES, DocumentTooLarge, parse_json
from router_core.evaluation.outcomes import parse_row, read_rows
from router_core.fitting import EmbeddedPrompts, PromptSample, batches, count_nearest, embed_prompts, sample_prompts
from router_core.text import truncate_middle
from router_core.types import Doubles, Embedder, Indices

if TYPE_CHECKING:
    from router_core.fitting import PromptSample
    from router_core.types import Indices


_TELL_EVERY = 10_000
"""Prompts."""


@dataclass(frozen=True, slots=True)
class FitPlan:
    """What is to be fitted."""

    paths: Sequence[Path]
    clusters: int
    seed: int
    embedder: str
    data_dir: Path


class FitBackend(Protocol):
    """Where the work is done. Each gives the same wherever that is."""

    def sample(self) -> PromptSample: ...

    def embed(self, prompts: Sequence[str]) -> EmbeddedPrompts: ...

    def count(self, fitted: ClusterMap) -> Indices:
        """(K,) how many of all prompts lie nearest to each cluster."""


class LocalBackend:
    """One after the other, in this process."""

    def __init__(self, order: FitPlan, bars: Progress) -> None:
        self._order = order
        self._bars = bars

    def sample(self) -> PromptSample:
        return sample_prompts(self._read("reading"), self._order.clusters, seed=self._order.seed)

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
        return opened_embedder(self._order.embedder, self._order.data_dir)

    def _read(self, label: str) -> Iterator[str]:
        return told(read_prompts(self._order.paths), label, self._bars)


class ProgressRate:
    """Prompts so far, and how many a second, on a bar whose end is not known."""

    def __init__(self, label: str, bars: Progress) -> None:
        self._label = label
        self._bars = bars
        self._started = time.monotonic()

    def tell(self, done: int, *, all_done: bool = False) -> None:
        per_second = done / max(time.monotonic() - self._started, 1e-3)
        self._bars.update(self._label, done, done if all_done else 0, f"{per_second:,.0f}/s")


def told(texts: Iterable[str], label: str, bars: Progress) -> Iterator[str]:
    """The texts, while the bar says how many they are."""
    rate, done = ProgressRate(label, bars), 0
    for done, text in enumerate(texts, 1):
        yield text
        if done % _TELL_EVERY == 0:
            rate.tell(done)
    rate.tell(done, all_done=True)


@dataclass(frozen=True, eq=False)
class KnownModels:
    models: tuple[str, ...]
    """R names, sorted."""
    scores: Doubles
    """(n, R) in [0, 1] of n prompts, NaN where unlabelled."""


def known_models(outcomes: Path | None, prompts: Sequence[str]) -> KnownModels:
    """Scores of these prompts, as prompt files are read; several of one model on one prompt count as their mean.

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
    return KnownModels(models, scores)


def _means(scored: Sequence[tuple[int, float]], prompts: int) -> Doubles:
    rows, scores = np.array([row for row, _ in scored]), np.array([score for _, score in scored])
    counts = np.bincount(rows, minlength=prompts)
    sums = np.bincount(rows, weights=scores, minlength=prompts)
    return np.asarray(np.divide(sums, counts, out=np.full(prompts, np.nan), where=counts > 0))


_PARQUET_ROWS = 1024

_PARQUET_BUFFER = 1 << 20

_FIELDS = ("prompt", "messages")

_NEEDS = 'needs "prompt" (text) or "messages" (a list of chat messages)'


def check_prompt_files(paths: Iterable[Path]) -> None:
    """Whether all of them can be read, before the first is. Raises BadArgument."""
    for path in paths:
        readable(path, "PROMPTS")
        if _reader(path) is _parquet and find_spec("pyarrow") is None:
            raise BadArgument(f"{path}: reading Parquet needs pyarrow; pip install 'uniroute[parquet]'")


def read_prompts(paths: Iterable[Path]) -> Iterator[str]:
    """One text per line of a text file; of JSONL and Parquet the "prompt", or the user turns of the "messages".

    A text too long to be looked at whole when it is routed is cut as it is then.
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
    """Only the columns that are read, a buffer of each at a time."""
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


PROMPTS_HELP = 'Text (one prompt a line), JSONL (.gz too) or Parquet files; rows have a "prompt" or "messages".'

OUTCOMES_HELP = """Scored prompts (JSONL), read with the others: the map remembers how hard its clusters are and how the
scored models differ. Of three models or more, each scored on 100 prompts, it has clusters of prompts that they find
alike. A new model then needs fewer answers."""

RAY_HELP = """Read and embed on Ray: `local` starts one on this machine, else the address of yours. The map is the same.
Each file is read by one worker, and must have the same path on every machine. Needs pip install 'uniroute[ray]'."""


def fit(
    out: Annotated[Path, typer.Option("--out", help="Folder to write the map to.")],
    prompts: Annotated[list[Path] | None, typer.Argument(help=PROMPTS_HELP)] = None,
    outcomes: Annotated[Path | None, typer.Option("--outcomes", help=OUTCOMES_HELP)] = None,
    clusters: Annotated[int, typer.Option("--clusters", min=2, max=4096, help="K, how many clusters.")] = 64,
    seed: Annotated[int, typer.Option("--seed", help="Same prompts, same seed: same map.")] = 0,
    embedder: Annotated[
        str, typer.Option("--embedder", help="static, transformer, a model's folder or name.")
    ] = "static",
    data_dir: DataDirOption = None,
    ray: Annotated[str | None, typer.Option("--ray", metavar="ADDRESS", help=RAY_HELP)] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="With --ray: embedders at once; by default one per CPU.")
    ] = None,
    *,
    count: Annotated[
        bool, typer.Option("--count", help="Then assign every prompt, and say how many each cluster has.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Fit a cluster map on unlabelled prompts. Models are measured on it anew: by their recorded answers, if any.

    Any number of prompts: they are streamed, and K-means sees a sample of the distinct ones, drawn by --seed: 256 for
    each cluster, and at least 16,384.
    """
    from proxy.cli import console
    from proxy.cli.console import empty_folder, known_embedder
    from proxy.cli.options import read_settings
    from router_core.artifact import save_map
    from router_core.fitting import distinct_prompts, fit_with_outcomes

    paths = [*(prompts or ()), *([outcomes] if outcomes else ())]
    if not paths:
        raise console.BadArgument("there is nothing to fit to: give files of prompts, or --outcomes")
    if workers and not ray:
        raise console.BadArgument("--workers is for --ray; one process embeds without it")
    settings = read_settings(None, data_dir=data_dir)
    if not ray:
        known_embedder(embedder, "--embedder")
    check_prompt_files(paths)
    empty_folder(out, "--out")
    order = FitPlan(paths, clusters, seed, embedder, settings.data_dir)
    with console.progress() as bars, _steps(order, bars, ray, workers) as steps:
        sample = steps.sample()
        embedded = steps.embed(distinct_prompts(sample, clusters))
        known = known_models(outcomes, embedded.texts)
        fitted = fit_with_outcomes(embedded, known.scores, known.models, clusters, seed=seed, progress=bars.update)
        save_map(fitted, out)
        counts = steps.count(fitted) if count else None
    _tell_json(fitted, sample, counts, out) if as_json else _tell(fitted, sample, counts, out)


@contextmanager
def _steps(order: FitPlan, bars: Progress, ray: str | None, workers: int | None) -> Iterator[FitBackend]:

    if ray is None:
        yield LocalBackend(order, bars)
        return
    from proxy.cli.fit_ray import steps_on_ray

    with steps_on_ray(order, bars, ray, workers) as steps:
        yield steps


def _tell(fitted: ClusterMap, sample: PromptSample, counts: Indices | None, out: Path) -> None:
    from proxy.cli import console

    console.say(
        f"{out}: map {fitted.id} with {fitted.size} clusters of {len(sample):,} distinct prompts, {sample.read:,} read"
    )
    if fitted.reference_models and (known := fitted.reference_models.models):
        alike = (
            f", and gave it {fitted.size - len(fitted.centroids)} of the clusters" if fitted.learned_clusters else ""
        )
        console.say(f"it remembers {len(known)} models{alike}: {', '.join(known)}")
    for number, name in enumerate(fitted.names):
        counted = "" if counts is None else f"{counts[number]:>10,}  " if number < counts.size else " " * 12
        console.say(f"  {number:>3}  {counted}{name}")
    console.say(f"use it with `map: {out}` in the uniroute section, or UNIROUTE_MAP={out}")


def _tell_json(fitted: ClusterMap, sample: PromptSample, counts: Indices | None, out: Path) -> None:
    from proxy.cli import console

    document: dict[str, object] = {
        "map": fitted.id,
        "clusters": fitted.size,
        "taught_clusters": fitted.size - len(fitted.centroids),
        "known_models": list(fitted.reference_models.models) if fitted.reference_models else [],
        "prompts": sample.read,
        "sampled": len(sample),
    }
    counted = {} if counts is None else {"counts": counts.tolist()}
    console.emit_json(document | counted | {"folder": str(out)})
