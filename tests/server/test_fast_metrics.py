from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from proxy.server.metrics import FastCounter, FastHistogram, Metrics

BOUNDS = (0.05, 0.1, 1, 2.5)
LABELS = st.sampled_from([("small", "scored"), ("large", "scored"), ('odd"\\', "pinned")])
AMOUNTS = st.floats(0, 1e12) | st.integers(0, 10**12)
SECONDS = st.sampled_from([0.0, *BOUNDS, 600.0]) | st.floats(-1, 1e6)


def exposed(collector: Any, write: Callable[[Any], bytes] = generate_latest) -> list[str]:
    """Return the exposition without the times at which the series began."""
    registry = CollectorRegistry()
    registry.register(collector)
    lines = write(registry).decode().splitlines()
    return [line.rsplit(" ", 1)[0] if "_created" in line and line[0] != "#" else line for line in lines]


@given(st.lists(st.tuples(LABELS, AMOUNTS), max_size=8))
@settings(max_examples=100, deadline=None)
def test_a_counter_is_exposed_as_prometheus_clients(added: list[tuple[tuple[str, str], float]]) -> None:
    ours = FastCounter("asked", "Requests", ("model", "reason"))
    theirs = Counter("asked", "Requests", ("model", "reason"), registry=None)
    for labels, amount in added:
        ours.add(labels, amount)
        theirs.labels(*labels).inc(amount)
    assert exposed(ours) == exposed(theirs)
    assert exposed(ours, generate_openmetrics) == exposed(theirs, generate_openmetrics)


@given(st.lists(st.tuples(LABELS, SECONDS), max_size=8))
@settings(max_examples=100, deadline=None)
def test_a_histogram_is_exposed_as_prometheus_clients(observed: list[tuple[tuple[str, str], float]]) -> None:
    ours = FastHistogram("took", "Seconds", ("model", "reason"), BOUNDS)
    theirs = Histogram("took", "Seconds", ("model", "reason"), buckets=BOUNDS, registry=None)
    for labels, amount in observed:
        ours.observe(amount, labels)
        theirs.labels(*labels).observe(amount)
    assert exposed(ours) == exposed(theirs)
    assert exposed(ours, generate_openmetrics) == exposed(theirs, generate_openmetrics)


def test_a_histogram_without_labels_is_there_before_anything_is_observed() -> None:
    theirs = Histogram("took", "Seconds", buckets=BOUNDS, registry=None)
    ours = FastHistogram("took", "Seconds", (), BOUNDS)
    assert exposed(ours) == exposed(theirs)
    ours.observe(0.3)
    theirs.observe(0.3)
    assert exposed(ours) == exposed(theirs)


def test_a_series_says_when_it_began() -> None:
    clock = iter([5.0, 7.0])
    counter = FastCounter("asked", "Requests", ("model",), clock=lambda: next(clock))
    counter.add(("small",))
    counter.add(("large",))
    counter.add(("small",))
    (family,) = counter.collect()
    began = {sample.labels["model"]: sample.value for sample in family.samples if sample.name == "asked_created"}
    assert began == {"small": 5.0, "large": 7.0}


def test_what_a_request_writes_is_exposed_under_its_old_names() -> None:
    metrics = Metrics()
    metrics.requests.add(("small", "scored", "complete"))
    metrics.overhead.observe(0.0007)
    metrics.seconds.observe(0.2, ("small",))
    text = metrics.expose().decode()
    assert 'uniroute_requests_total{ending="complete",model="small",reason="scored"} 1.0' in text
    assert 'uniroute_overhead_seconds_bucket{le="0.001"} 1.0' in text
    assert 'uniroute_request_seconds_sum{model="small"} 0.2' in text
