import fcntl
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from router_core import embedding
from router_core.distill import TABLE, TOKENIZER, distill, embedder_id, model_folder, token_weights
from router_core.errors import Interrupted, InvalidArtifact


def test_unknown_weights_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    with pytest.raises(InvalidArtifact, match="sha256"):
        distill(tmp_path / "made", tmp_path)
    assert not (tmp_path / "made").exists()


def test_progress_of_distilling_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = "import pathlib, sys; print(1, 4); print('a hint'); print(4, 4); pathlib.Path(sys.argv[1]).mkdir()"
    monkeypatch.setattr(embedding, "DISTILL_COMMAND", made)
    progress: list[tuple[int, int]] = []
    embedding._distill_in_process(tmp_path / "static", lambda done, total: progress.append((done, total)))

    assert progress == [(1, 4), (4, 4)]
    assert (tmp_path / "static").is_dir()


def test_stopping_ends_the_distilling_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = "import os, time; print(os.getpid(), 10**9, flush=True); time.sleep(60)"
    monkeypatch.setattr(embedding, "DISTILL_COMMAND", endless)
    stop, pids = threading.Event(), list[int]()

    def progress(pid: int, _: int) -> None:
        pids.append(pid)
        stop.set()

    with pytest.raises(Interrupted):
        embedding.static_embedder(tmp_path, progress=progress, stop=stop)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
    assert list(tmp_path.glob(f"{embedding.SCRATCH_PREFIX}*")) == []


def test_a_second_process_reports_the_progress_of_the_first(tmp_path: Path) -> None:
    stop, progress = threading.Event(), list[tuple[int, int]]()

    def follow(done: int, total: int) -> None:
        progress.append((done, total))
        stop.set()

    with (tmp_path / ".static-1.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("3 4")
        lock.flush()
        with pytest.raises(Interrupted):
            embedding.static_embedder(tmp_path, progress=follow, stop=stop)
    assert progress == [(3, 4)]


def test_the_table_has_a_centred_row_as_long_as_its_weight_for_every_token(embedder_cache: Path) -> None:
    table, weights = np.load(embedder_cache / embedder_id() / TABLE), token_weights()
    vocabulary = (model_folder() / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert table.shape == (len(vocabulary), 384)
    assert np.linalg.norm(table, axis=1) == pytest.approx(weights, rel=1e-5)
    assert np.linalg.norm((table / weights[:, None]).mean(axis=0)) < 0.1


def test_the_cache_holds_the_table_and_nothing_half_made(embedder_cache: Path) -> None:
    assert {path.name for path in (embedder_cache / embedder_id()).iterdir()} == {TABLE, TOKENIZER}
    assert list(embedder_cache.glob(".distilling-*")) == []
