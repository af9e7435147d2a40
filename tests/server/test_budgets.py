"""Reserve, settle, release and end in every order: the store agrees with a model of it."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from proxy.server.reservations import PREFIX, state_key
from proxy.storage.valkey import EmbeddedValkey
from router_core.pricing import PICO
from tests.support.limited_keys import KeyScripts
from tests.support.waiting import wait_until

LIMIT = 1_000 * 10**9
AMOUNTS = st.integers(0, 400 * 10**9)
CONNECTIONS = st.integers(0, 2)


class Ledger(RuleBasedStateMachine):
    """Do each step over one of three connections."""

    socket = ""
    reservations = Bundle("reservations")
    ended = Bundle("ended")

    def __init__(self) -> None:
        super().__init__()
        key = uuid.uuid4().hex
        self.clients = [redis.Redis(unix_socket_path=self.socket, decode_responses=True) for _ in range(3)]
        self.scripts = [KeyScripts(client, key) for client in self.clients]
        self.root = f"{PREFIX}{{{key}}}:"
        self.spent = 0
        self.beyond = 0
        """What requests cost more than was reserved for them."""
        self.open: dict[str, int] = {}
        self.took: dict[str, int] = {}
        """What the answers of open reservations are known to have cost."""

    def teardown(self) -> None:
        for client in self.clients:
            client.close()

    @rule(target=reservations, at=CONNECTIONS, amount=AMOUNTS)
    def reserve(self, at: int, amount: int) -> Any:
        reservation = uuid.uuid4().hex
        granted = not amount or self.spent + sum(self.open.values()) + amount <= LIMIT
        assert (self._reserve(at, reservation, amount) == "granted") == granted
        if not granted:
            return multiple()
        self.open[reservation] = amount
        return reservation

    @rule(at=CONNECTIONS, reservation=reservations)
    def reserve_again(self, at: int, reservation: str) -> None:
        """Repeat a reservation whose connection broke before its answer came."""
        if reservation in self.open:
            assert self._reserve(at, reservation, self.open[reservation]) == "granted"

    @rule(target=ended, at=CONNECTIONS, reservation=consumes(reservations), cost=AMOUNTS)
    def settle(self, at: int, reservation: str, cost: int) -> str:
        cost = self.took.get(reservation, cost)
        self.scripts[at].settle(reservation, cost)
        self.spent += cost
        self.beyond += max(0, cost - self.open.pop(reservation, 0))
        return reservation

    @rule(at=CONNECTIONS, reservation=reservations, cost=AMOUNTS)
    def answer(self, at: int, reservation: str, cost: int) -> None:
        """End an answer whose usage record is still to come. Repeated, it counts once."""
        for _ in range(2):
            self.scripts[at].end(reservation, cost)
        if reservation in self.open and reservation not in self.took:
            self.beyond += max(0, cost - self.open[reservation])
            self.open[reservation] = self.took[reservation] = cost

    @rule(target=ended, at=CONNECTIONS, reservation=consumes(reservations))
    def settle_unknown(self, at: int, reservation: str) -> str:
        """Settle without a cost: the reserved amount counts."""
        self.scripts[at].settle(reservation, "")
        self.spent += self.open.pop(reservation, 0)
        return reservation

    @rule(at=CONNECTIONS, reservation=reservations | ended)
    def release(self, at: int, reservation: str) -> None:
        self.scripts[at].settle(reservation, 0)
        self.open.pop(reservation, None)

    @rule(at=CONNECTIONS, reservation=reservations)
    def end(self, at: int, reservation: str) -> None:
        """Expire a reservation, and let another one be the first to notice."""
        if reservation in self.open:
            self.clients[at].zadd(f"{self.root}open", {reservation: 0})
            self.open.pop(reservation)
            self._reserve(at, "one of nothing", 0)
            self.open["one of nothing"] = 0

    @invariant()
    def agrees(self) -> None:
        client = self.clients[0]
        reserved, over = (int(client.hget(f"{self.root}state", name) or 0) for name in ("reserved", "ended"))
        assert over == sum(cost for name, cost in self.took.items() if name in self.open)
        assert reserved + over == sum(self.open.values())
        assert client.zcard(f"{self.root}open") == client.hlen(f"{self.root}held") == len(self.open)
        for period in ("day", "month"):
            counters: Any = client.keys(f"{self.root}{period}:*")
            assert sum(int(client.get(counter) or 0) for counter in counters) == self.spent
        assert self.spent + sum(self.open.values()) <= LIMIT + self.beyond

    def _reserve(self, at: int, reservation: str, amount: int) -> str:
        return self.scripts[at].reserve(reservation, amount, picousd_per_day=LIMIT, picousd_per_month=10 * LIMIT)


def test_the_store_agrees_with_a_model_of_it_and_overspends_within_its_bound(valkey: EmbeddedValkey) -> None:
    Ledger.socket = str(valkey.socket_path)
    run_state_machine_as_test(Ledger, settings=settings(max_examples=50, stateful_step_count=40, deadline=None))


@pytest.fixture
def client(valkey: EmbeddedValkey) -> Any:
    with redis.Redis(unix_socket_path=str(valkey.socket_path), decode_responses=True) as opened:
        opened.flushall()
        yield opened


def test_small_amounts_add_up_exactly_on_top_of_a_large_one(client: Any) -> None:
    """Past what a Lua number can hold."""
    scripts = KeyScripts(client)
    for picousd in (9 * 10**17, *[1] * 100):
        scripts.settle("", picousd, day="2026-01-01")

    assert client.get(f"{PREFIX}{{k}}:day:2026-01-01") == str(9 * 10**17 + 100)


def test_a_record_without_a_reservation_counts_for_a_later_limit(client: Any) -> None:
    scripts = KeyScripts(client)
    scripts.settle("", 2 * PICO)

    assert scripts.reserve("r", 10**9, picousd_per_day=PICO) == "day"


def test_a_cost_belongs_to_the_day_of_its_reservation_whatever_the_writers_clock_says(client: Any) -> None:
    scripts = KeyScripts(client)
    scripts.reserve("r", PICO)
    scripts.settle("r", PICO, day="1999-01-01")

    assert client.get(f"{PREFIX}{{k}}:day:{scripts.today}") == str(PICO)
    assert client.get(f"{PREFIX}{{k}}:month:{scripts.today[:7]}") == str(PICO)


def test_a_request_waits_for_no_disk_before_its_usage_record(client: Any) -> None:
    before, scripts = file_size(client), KeyScripts(client)
    reserve_a_dollar(scripts, "r")
    scripts.end("r", PICO, tokens=10)
    assert file_size(client) == before

    scripts.settle("r", PICO, tokens=10)
    assert file_size(client) > before


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    server = EmbeddedValkey(tmp_path)
    server.ensure()
    yield server
    server.stop()


@pytest.mark.parametrize("rewritten", [False, True])
def test_a_restarted_store_has_what_was_spent_and_forgets_what_was_reserved(
    own_valkey: EmbeddedValkey, *, rewritten: bool
) -> None:
    """A rewrite of its file keeps the reservations of that moment. They are released, or expire, as they did before."""
    with redis.Redis(unix_socket_path=str(own_valkey.socket_path), decode_responses=True) as client:
        scripts = KeyScripts(client)
        for name in ("settled", "under way", "dead"):
            reserve_a_dollar(scripts, name)
        if rewritten:
            client.bgrewriteaof()
            assert wait_until(lambda: not persistence(client)["aof_rewrite_in_progress"])
        scripts.settle("settled", PICO, tokens=10)
        os.kill(client.info("server")["process_id"], signal.SIGKILL)
        assert wait_until(lambda: not own_valkey._is_alive())
        own_valkey.ensure()

        kept = 3 * PICO if rewritten else 0
        assert client.get(f"{PREFIX}{{k}}:day:{scripts.today}") == str(PICO)
        assert int(client.hget(state_key("k"), "reserved") or 0) == kept

        scripts.settle("under way", 2 * PICO, tokens=10)
        for name in client.zrange(f"{PREFIX}{{k}}:open", 0, -1):
            client.zadd(f"{PREFIX}{{k}}:open", {name: 0})
        reserve_a_dollar(scripts, "new")
        assert client.get(f"{PREFIX}{{k}}:day:{scripts.today}") == str(3 * PICO)
        assert client.hget(state_key("k"), "reserved") == str(PICO)


def reserve_a_dollar(scripts: KeyScripts, name: str) -> None:
    assert scripts.reserve(name, PICO, tokens=10, tokens_per_minute=1000) == "granted"


def persistence(client: Any) -> dict[str, Any]:
    found: dict[str, Any] = client.info("persistence")
    return found


def file_size(client: Any) -> int:
    return int(persistence(client)["aof_current_size"])


def test_counters_of_a_period_expire_after_it(client: Any) -> None:
    KeyScripts(client).settle("", PICO, day="2026-01-31")
    kept = {key.rpartition("}:")[2].partition(":")[0]: client.ttl(key) for key in client.keys(f"{PREFIX}*")}

    assert kept["day"] > 86_400
    assert kept["month"] > 31 * 86_400
