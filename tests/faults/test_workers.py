from __future__ import annotations

import math
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxy.server.metrics import Values, worker_deaths
from proxy.server.run import MAX_PAUSE_S, Slot, Supervisor, server_config
from proxy.server.startup import START_FAILED
from proxy.settings.schema import Settings
from tests.faults.gateway import CONFIGURED, Gateway, a_gateway
from tests.support.processes import children_of, fork_servers, owners_of
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until

TIMEOUT_S = 10


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("workers")
    with ScriptedUpstream(lambda _: "42") as upstream:
        opened = a_gateway(folder, embedder_cache, upstream, "--workers", "2", worker_health_timeout_s=TIMEOUT_S)
        with opened as gateway:
            yield gateway


def scraped_by(gateway: Gateway, pid: int) -> dict[str, float]:
    """Return every sample of one worker, over new connections until one is its own."""
    headers = {"authorization": f"Bearer {gateway.client_key}"} if gateway.client_key else {}
    while True:
        with httpx.stream("GET", f"{gateway.url}/metrics", headers=headers, timeout=60) as answer:
            found = owners_of(answer, [pid])
            answer.read()
        if found:
            families = text_string_to_metric_families(answer.text)
            return {f"{s.name}{sorted(s.labels.items())}": s.value for family in families for s in family.samples}


def ask(gateway: Gateway, times: int) -> None:
    with ThreadPoolExecutor(8) as asking:
        assert set(asking.map(lambda _: gateway.ask(CONFIGURED).status_code, range(times))) == {200}


def requests(samples: dict[str, float]) -> float:
    return sum(value for name, value in samples.items() if name.startswith("uniroute_requests_total"))


def counted(samples: dict[str, float]) -> dict[str, float]:
    """Return the values that never go back, without the times at which they began, and CPU that the scrapes use."""
    return {n: v for n, v in samples.items() if re.match(r"uniroute\w+_(total|count|sum|bucket)\b", n)}


def agreed(gateway: Gateway, *pids: int, total: float) -> list[dict[str, float]]:
    """Return what two workers show once they show the same. Answers may be counted after their clients have them."""
    seen: list[dict[str, float]] = []

    def agree() -> bool:
        seen[:] = [scraped_by(gateway, pid) for pid in pids]
        return counted(seen[0]) == counted(seen[1]) and requests(seen[0]) == total

    assert wait_until(agree), [
        set(counted(one).items()) - set(counted(other).items()) for one, other in (seen, seen[::-1])
    ]
    return seen


def both_ready(gateway: Gateway, gone: set[int]) -> Callable[[], bool]:
    """Return a check that two workers, none of them in `gone`, have counted themselves in."""

    def there() -> bool:
        workers = set(children_of(gateway.server.pid)) - gone
        return len(workers) == 2 and all(served_by_any(gateway, pid) for pid in workers)

    return there


def served_by_any(gateway: Gateway, pid: int) -> bool:
    with httpx.stream("GET", f"{gateway.url}/readyz", timeout=60) as answer:
        return answer.status_code == 200 and bool(owners_of(answer, [pid]))


def test_every_metric_is_the_sum_over_workers_also_after_one_was_killed(gateway: Gateway) -> None:
    ask(gateway, 40)
    one, other = children_of(gateway.server.pid)
    seen = agreed(gateway, one, other, total=40)
    assert seen[0].keys() == seen[1].keys()
    assert all(
        sum(1 for name in seen[0] if name.startswith(gauge)) == 1 for gauge in ("uniroute_in_flight", "uniroute_tasks")
    )

    os.kill(one, signal.SIGKILL)
    assert wait_until(lambda: "killed by SIGKILL" in gateway.server.log)
    after = counted(scraped_by(gateway, other))
    assert all(after[name] >= value for name, value in counted(seen[0]).items())
    assert after["uniroute_worker_deaths_total[('cause', 'SIGKILL')]"] == 1

    assert wait_until(both_ready(gateway, {one})), gateway.server.log
    ask(gateway, 20)
    (new,) = set(children_of(gateway.server.pid)) - {one, other}
    agreed(gateway, new, other, total=60)


def test_a_restarted_worker_gets_no_request_before_it_is_ready(gateway: Gateway) -> None:
    (killed, _) = children_of(gateway.server.pid)
    os.kill(killed, signal.SIGKILL)
    assert wait_until(lambda: killed not in children_of(gateway.server.pid))
    both, statuses = both_ready(gateway, {killed}), []
    while not both():
        statuses.append(gateway.ask(CONFIGURED).status_code)
    assert set(statuses) == {200}


def test_an_unresponsive_worker_is_killed_logged_and_replaced(gateway: Gateway) -> None:
    stopped, other = children_of(gateway.server.pid)
    os.kill(stopped, signal.SIGSTOP)
    assert wait_until(lambda: f"worker {stopped} died" in gateway.server.log)
    (line,) = [line for line in gateway.server.log.splitlines() if f"worker {stopped} died" in line]
    assert "WARNING" in line
    assert f"gave no sign of life for {TIMEOUT_S} s" in line
    assert scraped_by(gateway, other)["uniroute_worker_deaths_total[('cause', 'unresponsive')]"] == 1


def test_after_signals_to_all_processes_it_is_still_known_how_a_worker_ends(gateway: Gateway) -> None:
    assert wait_until(both_ready(gateway, set())), gateway.server.log
    victim, _ = children_of(gateway.server.pid)
    for pid in fork_servers(gateway.server.pid):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
    os.kill(victim, signal.SIGKILL)
    assert wait_until(lambda: f"worker {victim} died" in gateway.server.log)
    assert re.search(rf"worker {victim} died .*: killed by SIGKILL", gateway.server.log)


def dying(exitcode: int, lived_s: float) -> Any:
    return SimpleNamespace(process=SimpleNamespace(pid=1, exitcode=exitcode), lived_s=lived_s, is_ready=False)


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    settings = Settings(workers=2)
    with socket.socket() as bound:
        made = Supervisor(settings, lambda counts: server_config(settings, counts), bound)
        made._deaths = worker_deaths(Values())
        yield made


def test_a_worker_that_keeps_dying_is_restarted_after_growing_pauses(
    supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    place = Slot()
    for pause_s in (1, 2, 4, 8, 16, MAX_PAUSE_S, MAX_PAUSE_S, MAX_PAUSE_S):
        place.worker = dying(-signal.SIGSEGV, lived_s=0.5)
        before = time.monotonic()
        supervisor._look_after(place)
        assert before + pause_s <= place.due <= time.monotonic() + pause_s
        place.due = math.inf
        supervisor._look_after(place)
        assert place.worker is None  # not before its time
    assert "killed by SIGSEGV; another is started in 4 s" in caplog.messages[2]

    place.worker = dying(1, lived_s=3600)
    supervisor._look_after(place)
    assert (place.due <= time.monotonic(), "ended with status 1; another is started now" in caplog.text) == (True, True)


@pytest.mark.parametrize(("ever_ready", "ends"), [(False, True), (True, False)])
def test_a_failed_start_ends_the_server_only_while_no_worker_was_ever_ready(
    supervisor: Supervisor, ever_ready: bool, ends: bool
) -> None:
    supervisor._ever_ready = ever_ready
    supervisor._look_after(Slot(dying(START_FAILED, lived_s=3)))
    assert supervisor._ending.is_set() == ends
