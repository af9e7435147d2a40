"""The steps of fitting a map, on Ray Data: files are read, and prompts embedded and assigned, by several workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from proxy.cli.console import BadArgument, Progress
from proxy.cli.fit_steps import Order, Rate
from proxy.cli.inputs import opened_embedder
from proxy.cli.prompt_files import read_prompts
from proxy.cli.ray_connection import connected
from router_core.clustering import ClusterMap
from router_core.embedding import open_embedder
from router_core.fitting import BATCH, EmbeddedPrompts, batches, count_nearest
from router_core.sampling import PromptSample, empty_sample, sample_prompts
from router_core.types import Embedder, Indices

if TYPE_CHECKING:
    from ray.data import Dataset

Batch = dict[str, Any]


@contextmanager
def steps_on_ray(order: Order, bars: Progress, address: str, workers: int | None) -> Iterator[StepsOnRay]:
    """For as long as Ray is connected."""
    with connected(address, workers) as embedders:
        yield StepsOnRay(order, bars, embedders)


class StepsOnRay:
    """The same functions as in one process. Bit for bit the same map with the static embedder.

    A transformer's vectors may differ in the last digit where machines, or numbers of threads, do.
    """

    def __init__(self, order: Order, bars: Progress, workers: int) -> None:
        self._order = order
        self._bars = bars
        self._workers = workers

    def sample(self) -> PromptSample:
        """Of each file, merged as they come: parts of the sample do not depend on each other."""
        merged = empty_sample(self._order.clusters, seed=self._order.seed)
        rate = Rate("reading", self._bars)
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
        rate = Rate("counting", self._bars)
        read = self._files().map_batches(read_texts, batch_size=1)
        made = self._by_workers(read, partial(count_batch, order=self._order, hard=fitted.hardened()))
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


def sample_file(file: Mapping[str, Any], order: Order) -> dict[str, Any]:
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


def embed_batch(batch: Batch, order: Order) -> Batch:
    return {"row": batch["row"], "vector": _embedder(order).embed(_unpacked(batch["text"]))}


def count_batch(batch: Batch, order: Order, hard: ClusterMap) -> Batch:
    bad = next(filter(None, batch["bad"].tolist()), "")
    counts = count_nearest(_unpacked(batch["text"]), _embedder(order), hard)
    return {"counts": counts[None, :], "bad": np.array([bad])}


@lru_cache(maxsize=1)
def _embedder_of(kind: str, data_dir: Path) -> Embedder:
    """Opened once by each worker process."""
    return open_embedder(kind, data_dir)


def _embedder(order: Order) -> Embedder:
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
