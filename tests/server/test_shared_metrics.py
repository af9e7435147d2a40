from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from proxy.server import metrics as values
from proxy.server.metrics import (
    SEGMENT_CELLS,
    FastCounter,
    FastGauge,
    FastHistogram,
    Metrics,
    SharedValues,
    Values,
    open_values,
    shared_folder,
)

COUNT = """
import sys
from pathlib import Path
from proxy.server.metrics import FastCounter, FastHistogram, FastGauge
from proxy.server.metrics import SharedValues
shared = SharedValues(Path(sys.argv[1]))
asked = FastCounter("asked", "", ["model"], values=shared)
took = FastHistogram("took", "", [], [1, 10], values=shared)
busy = FastGauge("busy", "", values=shared)
for _ in range(int(sys.argv[2])):
    asked.add(("small",))
    took.observe(5)
busy.set(int(sys.argv[2]))
print("counted", flush=True)
sys.stdin.read()
"""


@contextmanager
def counting(folder: Path, number: int) -> Iterator[subprocess.Popen[str]]:
    """Start another process that has counted to `number`; it is killed at the end."""
    command = [sys.executable, "-c", COUNT, str(folder), str(number)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "counted\n"
        try:
            yield process
        finally:
            process.kill()


class Scraped:
    """Return what one process exposes of all."""

    def __init__(self, folder: Path) -> None:
        self.values = SharedValues(folder)
        self.requests = FastCounter("asked", "", ["model"], values=self.values)
        self.took = FastHistogram("took", "", [], [1, 10], values=self.values)
        self.busy = FastGauge("busy", "", values=self.values)
        self._registry = CollectorRegistry()
        for each in (self.requests, self.took, self.busy):
            self._registry.register(each)

    def __call__(self, name: str, **labels: str) -> float | None:
        self.values.refresh()
        return self._registry.get_sample_value(name, labels)


def test_what_is_shown_is_the_sum_over_all_processes(tmp_path: Path) -> None:
    scraped = Scraped(tmp_path)
    scraped.requests.add(("small",), 10)
    scraped.busy.set(1)
    with counting(tmp_path, 3), counting(tmp_path, 4):
        assert scraped("asked_total", model="small") == 17
        assert [scraped("took_bucket", le=bound) for bound in ("1.0", "10.0", "+Inf")] == [0, 7, 7]
        assert (scraped("took_sum"), scraped("busy")) == (35, 8)


def test_a_killed_process_keeps_what_it_counted_and_its_gauges_go(tmp_path: Path) -> None:
    scraped = Scraped(tmp_path)
    with counting(tmp_path, 3) as other:
        os.kill(other.pid, signal.SIGKILL)
    assert (scraped("asked_total", model="small"), scraped("took_count"), scraped("busy")) == (3, 3, 0)
    with counting(tmp_path, 4):  # counts on where the other was killed
        assert (scraped("asked_total", model="small"), scraped("took_count"), scraped("busy")) == (7, 7, 4)
        assert len(list(tmp_path.glob("*.index"))) == 2
    assert scraped("asked_total", model="small") == 7


def test_a_series_began_when_the_first_process_counted_it(tmp_path: Path) -> None:
    first = FastCounter("asked", "", ["model"], values=SharedValues(tmp_path, lambda: 5.0))
    second = FastCounter("asked", "", ["model"], values=SharedValues(tmp_path, lambda: 9.0))
    for counted in (second, first):
        counted.add(("small",))
    second._values.refresh()
    (family,) = second.collect()
    assert {sample.name: sample.value for sample in family.samples} == {"asked_total": 2, "asked_created": 5}


def test_any_number_of_series_is_counted_and_read(tmp_path: Path) -> None:
    scraped, other = Scraped(tmp_path), SharedValues(tmp_path)
    requests = FastCounter("asked", "", ["model"], values=other)
    took = FastHistogram("took_long", "", ["model"], range(100), values=other)
    for number in range(300):
        requests.add((f"model-{number}",), number)
        took.observe(number, (f"model-{number}",))
    scraped.requests.add(("model-299",))
    assert other._free > 3 * SEGMENT_CELLS
    assert [scraped("asked_total", model=f"model-{number}") for number in (0, 150, 299)] == [0, 150, 300]


def test_a_line_that_was_cut_by_a_kill_is_no_series(tmp_path: Path) -> None:
    left = SharedValues(tmp_path)
    FastCounter("asked", "", ["model"], values=left).add(("small",), 2)
    os.write(left._index, b'["counter", "asked", ["lar')
    os.close(left._index)
    scraped = Scraped(tmp_path)
    scraped.requests.add(("large",), 5)
    assert (scraped("asked_total", model="small"), scraped("asked_total", model="large")) == (2, 5)


def test_where_there_is_no_room_a_worker_counts_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(values, "SHARED_MEMORY", tmp_path / "nowhere")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere either"))
    with shared_folder() as folder:
        assert folder is None
    assert type(open_values(tmp_path / "gone")) is Values
    assert "/metrics of each worker" in caplog.text


def test_folders_of_supervisors_that_were_killed_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "SHARED_MEMORY", tmp_path)
    left, used, young = (tmp_path / f"{values.PREFIX}{name}" for name in ("left", "used", "young"))
    for folder in (left, used, young):
        folder.mkdir()
        holding = SharedValues(folder)
        if folder != used:
            os.close(holding._index)
        if folder != young:
            os.utime(folder, (0, 0))
    with shared_folder() as made:
        assert made is not None
        assert {path.name for path in tmp_path.iterdir()} == {used.name, young.name, made.name}
        assert made.stat().st_mode & 0o077 == 0
    assert not made.exists()


def test_every_metric_of_the_registry_is_of_the_shared_kind(tmp_path: Path) -> None:
    """One that is not would show the worker that happens to be asked."""
    one, other = Metrics(SharedValues(tmp_path)), Metrics(SharedValues(tmp_path))
    kinds = {type(collector) for collector in one.registry._collector_to_names}
    assert kinds == {FastCounter, FastHistogram, FastGauge}
    other.errors.labels("500").inc()
    other.in_flight = 3
    other.refresh()
    exposed = one.expose().decode()
    assert 'uniroute_errors_total{status="500"} 1.0' in exposed
    assert "uniroute_in_flight 3.0" in exposed
