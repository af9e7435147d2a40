from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from proxy.cli.console import BadArgument, CommandError, Progress, opened_embedder
from proxy.cli.fit import FitPlan, ProgressRate, read_prompts
from router_core.clustering import ClusterMap
from router_core.embedding import open_embedder
from router_core.fitting import (
    BATCH,
    EmbeddedPrompts,
    PromptSample,
    batches,
    count_nearest,
    empty_sample,
    sample_prompts,
)
from router_core.types import Embedder, Indices

if TYPE_CHECKING:
    from ray.data import Dataset


LOCAL = "local"

_ALWAYS = {"RAY_USAGE_STATS_ENABLED": "0"}

_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""What makes Ray listen on 127.0.0.1 alone, on Linux too, despite its name."""

_SHORT_FOLDER = "/tmp"  # noqa: S108 - sockets lie in a private folder of it, and their paths have 104 bytes at most

_BLOCK_BYTES = 1 << 22
"""Of rows that pass from worker to worker: small, so that one large file keeps all of them busy."""

_HOST_AND_PORT = re.compile(r"(?:ray://)?\[?(?P<host>[^\[\]/]+)\]?:(?P<port>\d+)")

_ADDRESS_TIMEOUT_S = 5.0


@contextmanager
def connected(address: str, workers: int | None) -> Iterator[int]:
    """How many workers there are: as asked for, else one per CPU; elsewhere one CPU is left to those who read.

    Raises:
        BadArgument: Ray is not installed, or does not answer at `address`.
        CommandError: Ray failed while it was used.
    """
    if find_spec("ray") is None or find_spec("pyarrow") is None:
        raise BadArgument("--ray needs Ray Data; pip install 'uniroute[ray]'")
    _check_address(address)
    os.environ.update(_ALWAYS)  # Ray reads its environment when it is imported
    with tempfile.TemporaryDirectory(prefix="uniroute-", dir=_SHORT_FOLDER, ignore_cleanup_errors=True) as scratch:
        local = workers or os.cpu_count() or 1
        _connect(address, _ray_of_our_own(local, scratch) if address == LOCAL else {})
        import ray

        try:
            yield workers or (local if address == LOCAL else max(1, int(ray.cluster_resources().get("CPU", 1)) - 1))
        except ray.exceptions.RayError as error:
            raise CommandError(f"Ray: {str(error).strip().splitlines()[-1]}") from None
        finally:
            ray.shutdown()


def _ray_of_our_own(workers: int, scratch: str) -> dict[str, Any]:
    """It listens on loopback alone, wants a token, has no dashboard, and keeps what it writes in `scratch`."""
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
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = _BLOCK_BYTES


def _check_address(address: str) -> None:
    """Whether something listens there: Ray itself would go on trying for ever. Raises BadArgument."""
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
def steps_on_ray(order: FitPlan, bars: Progress, address: str, workers: int | None) -> Iterator[StepsOnRay]:
    """For as long as Ray is connected."""
    with connected(address, workers) as embedders:
        yield StepsOnRay(order, bars, embedders)


class StepsOnRay:
    """The same functions as in one process. Bit for bit the same map with the static embedder.

    A transformer's vectors may differ in the last digit where machines, or numbers of threads, do.
    """

    def __init__(self, order: FitPlan, bars: Progress, workers: int) -> None:
        self._order = order
        self._bars = bars
        self._workers = workers

    def sample(self) -> PromptSample:
        """Of each file, merged as they come: parts of the sample do not depend on each other."""
        merged = empty_sample(self._order.clusters, seed=self._order.seed)
        rate = ProgressRate("reading", self._bars)
        for row in self._files().map(partial(sample_file, order=self._order)).iter_rows():
            _raise_bad(row["bad"])
            merged.merge(row["sample"])
            rate.tell(merged.read)
        rate.tell(merged.read, all_done=True)
        return merged

    def embed(self, prompts: Sequence[str]) -> EmbeddedPrompts:
        """Each batch holds the prompts that it would hold in one process."""
        import ray

        embedder = opened_embedder(self._order.embedder, self._order.data_dir)
        vectors = np.empty((len(prompts), embedder.dimension), dtype=np.float32)
        done = 0
        made = self._by_workers(ray.data.from_arrow(_tables(prompts)), partial(embed_batch, order=self._order))
        for batch in made.iter_batches(batch_size=None):
            vectors[batch["row"]] = batch["vector"]
            done += len(batch["row"])
            self._bars.update("embedding", done, len(prompts))
        return EmbeddedPrompts(prompts, vectors, embedder.id)

    def count(self, fitted: ClusterMap) -> Indices:
        counts = np.zeros(fitted.size, dtype=np.int64)
        rate = ProgressRate("counting", self._bars)
        read = self._files().map_batches(read_texts, batch_size=1)
        made = self._by_workers(read, partial(count_batch, order=self._order, hard=fitted.with_hard_assignment()))
        for batch in made.iter_batches(batch_size=None):
            _raise_bad(*batch["bad"])
            counts += batch["counts"].sum(axis=0)
            rate.tell(int(counts.sum()))
        rate.tell(int(counts.sum()), all_done=True)
        return counts

    def _files(self) -> Dataset:
        import ray

        files = [{"part": part, "path": str(path.resolve())} for part, path in enumerate(self._order.paths)]
        return ray.data.from_items(files, override_num_blocks=len(files))

    def _by_workers(self, blocks: Dataset, work: Callable[[Batch], Batch]) -> Dataset:
        from ray.data import TaskPoolStrategy

        return blocks.map_batches(work, batch_size=BATCH, compute=TaskPoolStrategy(size=self._workers))


def sample_file(file: Mapping[str, Any], order: FitPlan) -> dict[str, Any]:
    """One row for one file. What is wrong with it is told in the row: an exception would crash the worker."""
    texts = read_prompts([Path(file["path"])])
    try:
        return {"sample": sample_prompts(texts, order.clusters, seed=order.seed, part=file["part"]), "bad": ""}
    except BadArgument as error:
        return {"sample": None, "bad": str(error)}


def read_texts(files: Batch) -> Iterator[Batch]:
    """Blocks of texts, while the file is still being read."""
    try:
        for texts in batches(read_prompts(map(Path, files["path"]))):
            yield {"text": _packed(texts), "bad": np.full(len(texts), "")}
    except BadArgument as error:
        yield {"text": _packed([""]), "bad": np.array([str(error)])}


def embed_batch(batch: Batch, order: FitPlan) -> Batch:
    return {"row": batch["row"], "vector": _embedder(order).embed(_unpacked(batch["text"]))}


def count_batch(batch: Batch, order: FitPlan, hard: ClusterMap) -> Batch:
    bad = next(filter(None, batch["bad"].tolist()), "")
    counts = count_nearest(_unpacked(batch["text"]), _embedder(order), hard)
    return {"counts": counts[None, :], "bad": np.array([bad])}


@lru_cache(maxsize=1)
def _embedder_of(kind: str, data_dir: Path) -> Embedder:
    """Opened once by each worker process."""
    return open_embedder(kind, data_dir)


def _embedder(order: FitPlan) -> Embedder:
    return _embedder_of(order.embedder, order.data_dir)


def _tables(prompts: Sequence[str]) -> list[Any]:
    import pyarrow as pa

    starts = range(0, len(prompts), BATCH)
    packed = [(start, _packed(prompts[start : start + BATCH])) for start in starts]
    return [pa.table({"row": np.arange(start, start + len(texts)), "text": pa.array(texts)}) for start, texts in packed]


def _packed(texts: Sequence[str]) -> list[bytes]:
    """Bytes, because Arrow's texts cannot hold the lone surrogates that JSON can."""
    return [text.encode("utf-8", "surrogatepass") for text in texts]


def _unpacked(texts: Sequence[bytes]) -> list[str]:
    return [text.decode("utf-8", "surrogatepass") for text in texts]


def _raise_bad(*messages: str) -> None:
    for message in filter(None, messages):
        raise BadArgument(str(message))
