from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from proxy.cli.console import BadArgument, CommandError, Progress, load_embedder, read_prompts
from router_core.clustering import ClusterMap
from router_core.embedding import open_embedder
from router_core.evaluation.outcomes import parse_row, read_rows
from router_core.fitting import (
    BATCH_SIZE,
    EmbeddedPrompts,
    PromptSample,
    batches,
    count_nearest,
    embed_prompts,
    empty_sample,
    sample_prompts,
)
from router_core.text import truncate_middle
from router_core.types import Doubles, Embedder, Indices

if TYPE_CHECKING:
    from ray.data import Dataset


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


LOCAL = "local"

_NO_USAGE_STATS = {"RAY_USAGE_STATS_ENABLED": "0"}

# Makes Ray listen on 127.0.0.1 alone, on Linux too, despite its name.
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

_SHORT_FOLDER = "/tmp"  # noqa: S108 - sockets lie in a private folder of it, and their paths have 104 bytes at most

# Rows pass from worker to worker in blocks of this size: small, so that one large file keeps all of them busy.
_BLOCK_BYTES = 1 << 22

_HOST_AND_PORT = re.compile(r"(?:ray://)?\[?(?P<host>[^\[\]/]+)\]?:(?P<port>\d+)")

_ADDRESS_TIMEOUT_S = 5.0


@contextmanager
def connected(address: str, workers: int | None) -> Iterator[int]:
    """Connect to Ray and yield the number of workers: `workers`, or one per CPU.

    On a cluster that already runs, one CPU is left to the tasks that read.

    Raises:
        BadArgument: Ray is not installed, or does not answer at `address`.
        CommandError: Ray failed while it was used.
    """
    if find_spec("ray") is None or find_spec("pyarrow") is None:
        raise BadArgument("--ray needs Ray Data; pip install 'uniroute[ray]'")
    _check_address(address)
    os.environ.update(_NO_USAGE_STATS)  # Ray reads its environment when it is imported
    with tempfile.TemporaryDirectory(prefix="uniroute-", dir=_SHORT_FOLDER, ignore_cleanup_errors=True) as scratch:
        local = workers or os.cpu_count() or 1
        _connect(address, _private_ray(local, scratch) if address == LOCAL else {})
        import ray

        try:
            yield workers or (local if address == LOCAL else max(1, int(ray.cluster_resources().get("CPU", 1)) - 1))
        except ray.exceptions.RayError as error:
            raise CommandError(f"Ray: {str(error).strip().splitlines()[-1]}") from None
        finally:
            ray.shutdown()


def _private_ray(workers: int, scratch: str) -> dict[str, Any]:
    """Return the arguments of a Ray that listens on loopback alone, requires a token and writes to `scratch`."""
    os.environ.update(_LOOPBACK, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    own: dict[str, Any] = {"num_cpus": workers + 1, "include_dashboard": False}
    return own | {"_node_ip_address": "127.0.0.1", "_temp_dir": scratch}


def _connect(address: str, own: dict[str, Any]) -> None:
    import ray
    from ray.data import DataContext

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, **own)
    except (ConnectionError, ValueError) as error:
        raise BadArgument(f"--ray {address}: {' '.join(str(error).split())}") from None
    except Exception as error:  # noqa: BLE001 - a bare one, for example after 30 s in which its processes did not start
        raise CommandError(f"Ray did not start: {' '.join(str(error).split())}") from None
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = _BLOCK_BYTES


def _check_address(address: str) -> None:
    """Check that something listens there: Ray itself would go on trying for ever. Raises BadArgument."""
    stated = _HOST_AND_PORT.fullmatch(address)
    if stated is None and address not in {LOCAL, "auto"}:
        raise BadArgument(f"--ray {address}: must be local, auto, HOST:PORT or ray://HOST:PORT")
    try:
        if stated:
            socket.create_connection((stated["host"], int(stated["port"])), _ADDRESS_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise BadArgument(f"--ray {address}: nothing answers there ({error})") from None


Batch = dict[str, Any]


@contextmanager
def ray_backend(plan: FitPlan, bars: Progress, address: str, workers: int | None) -> Iterator[RayBackend]:
    """Connect to Ray, and disconnect at the end."""
    with connected(address, workers) as embedders:
        yield RayBackend(plan, bars, embedders)


class RayBackend:
    """Fit on Ray, with the functions that one process uses: with the static embedder the map is the same bit for bit.

    A transformer's vectors may differ in the last digit where machines, or numbers of threads, do.
    """

    def __init__(self, plan: FitPlan, bars: Progress, workers: int) -> None:
        self._plan = plan
        self._bars = bars
        self._workers = workers

    def sample(self) -> PromptSample:
        """Sample each file, and merge the samples as they come: they do not depend on each other."""
        merged = empty_sample(self._plan.clusters, seed=self._plan.seed)
        rate = ProgressRate("reading", self._bars)
        for row in self._files().map(partial(sample_file, plan=self._plan)).iter_rows():
            _raise_bad(row["bad"])
            merged.merge(row["sample"])
            rate.update(merged.read)
        rate.update(merged.read, all_done=True)
        return merged

    def embed(self, prompts: Sequence[str]) -> EmbeddedPrompts:
        """Embed in batches of the prompts that they would hold in one process."""
        import ray

        embedder = load_embedder(self._plan.embedder, self._plan.data_dir)
        vectors = np.empty((len(prompts), embedder.dimension), dtype=np.float32)
        done = 0
        made = self._by_workers(ray.data.from_arrow(_tables(prompts)), partial(embed_batch, plan=self._plan))
        for batch in made.iter_batches(batch_size=None):
            vectors[batch["row"]] = batch["vector"]
            done += len(batch["row"])
            self._bars.update("embedding", done, len(prompts))
        return EmbeddedPrompts(prompts, vectors, embedder.id)

    def count(self, fitted: ClusterMap) -> Indices:
        counts = np.zeros(fitted.size, dtype=np.int64)
        rate = ProgressRate("counting", self._bars)
        read = self._files().map_batches(read_texts, batch_size=1)
        made = self._by_workers(read, partial(count_batch, plan=self._plan, hard=fitted.with_hard_assignment()))
        for batch in made.iter_batches(batch_size=None):
            _raise_bad(*batch["bad"])
            counts += batch["counts"].sum(axis=0)
            rate.update(int(counts.sum()))
        rate.update(int(counts.sum()), all_done=True)
        return counts

    def _files(self) -> Dataset:
        import ray

        files = [{"part": part, "path": str(path.resolve())} for part, path in enumerate(self._plan.paths)]
        return ray.data.from_items(files, override_num_blocks=len(files))

    def _by_workers(self, blocks: Dataset, work: Callable[[Batch], Batch]) -> Dataset:
        from ray.data import TaskPoolStrategy

        return blocks.map_batches(work, batch_size=BATCH_SIZE, compute=TaskPoolStrategy(size=self._workers))


def sample_file(file: Mapping[str, Any], plan: FitPlan) -> dict[str, Any]:
    """Return the one row of a file. Its error is part of the row: an exception would crash the worker."""
    texts = read_prompts([Path(file["path"])])
    try:
        return {"sample": sample_prompts(texts, plan.clusters, seed=plan.seed, part=file["part"]), "bad": ""}
    except BadArgument as error:
        return {"sample": None, "bad": str(error)}


def read_texts(files: Batch) -> Iterator[Batch]:
    """Yield blocks of texts while the file is still being read."""
    try:
        for texts in batches(read_prompts(map(Path, files["path"]))):
            yield {"text": _encoded(texts), "bad": np.full(len(texts), "")}
    except BadArgument as error:
        yield {"text": _encoded([""]), "bad": np.array([str(error)])}


def embed_batch(batch: Batch, plan: FitPlan) -> Batch:
    return {"row": batch["row"], "vector": _embedder(plan).embed(_decoded(batch["text"]))}


def count_batch(batch: Batch, plan: FitPlan, hard: ClusterMap) -> Batch:
    bad = next(filter(None, batch["bad"].tolist()), "")
    counts = count_nearest(_decoded(batch["text"]), _embedder(plan), hard)
    return {"counts": counts[None, :], "bad": np.array([bad])}


@lru_cache(maxsize=1)
def _embedder_of(kind: str, data_dir: Path) -> Embedder:
    """Open it once in each worker process."""
    return open_embedder(kind, data_dir)


def _embedder(plan: FitPlan) -> Embedder:
    return _embedder_of(plan.embedder, plan.data_dir)


def _tables(prompts: Sequence[str]) -> list[Any]:
    import pyarrow as pa

    starts = range(0, len(prompts), BATCH_SIZE)
    packed = [(start, _encoded(prompts[start : start + BATCH_SIZE])) for start in starts]
    return [pa.table({"row": np.arange(start, start + len(texts)), "text": pa.array(texts)}) for start, texts in packed]


def _encoded(texts: Sequence[str]) -> list[bytes]:
    """Encode to bytes: Arrow's strings cannot hold the lone surrogates that JSON can."""
    return [text.encode("utf-8", "surrogatepass") for text in texts]


def _decoded(texts: Sequence[bytes]) -> list[str]:
    return [text.decode("utf-8", "surrogatepass") for text in texts]


def _raise_bad(*messages: str) -> None:
    for message in filter(None, messages):
        raise BadArgument(str(message))


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
