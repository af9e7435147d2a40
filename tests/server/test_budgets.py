"""Reserve, settle, release and end in every order: the store agrees with a model of it."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
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

from proxy.server.reservations import END, PREFIX, RESERVE, SETTLE, state_key
from proxy.storage.valkey import EmbeddedValkey
from router_core.pricing import PICO
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
        self.clients = [redis.Redis(unix_socket_path=self.socket, decode_responses=True) for _ in range(3)]
        self.key = uuid.uuid4().hex
        self.root = f"{PREFIX}{{{self.key}}}:"
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
        verdict, *_ = self._reserve(at, reservation, amount)
        granted = not amount or self.spent + sum(self.open.values()) + amount <= LIMIT
        assert (verdict == "granted") == granted
        if not granted:
            return multiple()
        self.open[reservation] = amount
        return reservation

    @rule(at=CONNECTIONS, reservation=reservations)
    def reserve_again(self, at: int, reservation: str) -> None:
        """Repeat a reservation whose connection broke before its answer came."""
        if reservation in self.open:
            assert self._reserve(at, reservation, self.open[reservation])[0] == "granted"

    @rule(target=ended, at=CONNECTIONS, reservation=consumes(reservations), cost=AMOUNTS)
    def settle(self, at: int, reservation: str, cost: int) -> str:
        cost = self.took.get(reservation, cost)
        self._settle(at, reservation, str(cost))
        self.spent += cost
        self.beyond += max(0, cost - self.open.pop(reservation, 0))
        return reservation

    @rule(at=CONNECTIONS, reservation=reservations, cost=AMOUNTS)
    def answer(self, at: int, reservation: str, cost: int) -> None:
        """End an answer whose usage record is still to come. Repeated, it counts once."""
        for _ in range(2):
            self.clients[at].eval(END, 1, state_key(self.key), self.key, reservation, "", str(cost))
        if reservation in self.open and reservation not in self.took:
            self.beyond += max(0, cost - self.open[reservation])
            self.open[reservation] = self.took[reservation] = cost

    @rule(target=ended, at=CONNECTIONS, reservation=consumes(reservations))
    def settle_unknown(self, at: int, reservation: str) -> str:
        """Settle without a cost: the reserved amount counts."""
        self._settle(at, reservation, "")
        self.spent += self.open.pop(reservation, 0)
        return reservation

    @rule(at=CONNECTIONS, reservation=reservations | ended)
    def release(self, at: int, reservation: str) -> None:
        self._settle(at, reservation, "0")
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

    def _reserve(self, at: int, reservation: str, amount: int) -> Any:
        arguments = [self.key, reservation, 600, 0, amount, "", "", LIMIT, 10 * LIMIT]
        return self.clients[at].eval(RESERVE, 1, state_key(self.key), *map(str, arguments)).split()

    def _settle(self, at: int, reservation: str, cost: str) -> None:
        day = today(self.clients[at])
        self.clients[at].eval(SETTLE, 1, state_key(self.key), self.key, reservation, "", cost, day, day[:7])


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
    settle = client.register_script(SETTLE)
    settle(keys=[state_key("k")], args=["k", "", "", str(9 * 10**17), "2026-01-01", "2026-01"])
    for _ in range(100):
        settle(keys=[state_key("k")], args=["k", "", "", "1", "2026-01-01", "2026-01"])

    assert client.get(f"{PREFIX}{{k}}:day:2026-01-01") == str(9 * 10**17 + 100)


def test_a_record_without_a_reservation_counts_for_a_later_limit(client: Any) -> None:
    day = today(client)
    client.eval(SETTLE, 1, state_key("k"), "k", "", "", str(2 * PICO), day, day[:7])
    arguments = ["k", "r", 600, 0, 10**9, "", "", PICO, ""]

    assert client.eval(RESERVE, 1, state_key("k"), *map(str, arguments)).split()[0] == "day"


def test_a_cost_belongs_to_the_day_of_its_reservation_whatever_the_writers_clock_says(client: Any) -> None:
    client.eval(RESERVE, 1, state_key("k"), "k", "r", "600", "0", str(PICO), "", "", "", "")
    client.eval(SETTLE, 1, state_key("k"), "k", "r", "", str(PICO), "1999-01-01", "1999-01")

    assert client.get(f"{PREFIX}{{k}}:day:{today(client)}") == str(PICO)
    assert client.get(f"{PREFIX}{{k}}:month:{today(client)[:7]}") == str(PICO)


def test_a_request_waits_for_no_disk_before_its_usage_record(client: Any) -> None:
    before = file_size(client)
    reserve(client, "r")
    client.eval(END, 1, state_key("k"), "k", "r", "10", str(PICO))
    assert file_size(client) == before

    settle(client, "r", PICO)
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
        for name in ("settled", "under way", "dead"):
            reserve(client, name)
        if rewritten:
            client.bgrewriteaof()
            assert wait_until(lambda: not persistence(client)["aof_rewrite_in_progress"])
        settle(client, "settled", PICO)
        os.kill(client.info("server")["process_id"], signal.SIGKILL)
        assert wait_until(lambda: not own_valkey._is_alive())
        own_valkey.ensure()

        kept = 3 * PICO if rewritten else 0
        assert client.get(f"{PREFIX}{{k}}:day:{today(client)}") == str(PICO)
        assert int(client.hget(state_key("k"), "reserved") or 0) == kept

        settle(client, "under way", 2 * PICO)
        for name in client.zrange(f"{PREFIX}{{k}}:open", 0, -1):
            client.zadd(f"{PREFIX}{{k}}:open", {name: 0})
        reserve(client, "new")
        assert client.get(f"{PREFIX}{{k}}:day:{today(client)}") == str(3 * PICO)
        assert client.hget(state_key("k"), "reserved") == str(PICO)


def reserve(client: Any, name: str) -> None:
    """Reserve a dollar."""
    arguments = ["k", name, 600, 10, PICO, "", 1000, "", ""]
    assert client.eval(RESERVE, 1, state_key("k"), *map(str, arguments)).startswith("granted")


def settle(client: Any, name: str, picousd: int) -> None:
    client.eval(SETTLE, 1, state_key("k"), "k", name, "10", str(picousd), today(client), today(client)[:7])


def persistence(client: Any) -> dict[str, Any]:
    found: dict[str, Any] = client.info("persistence")
    return found


def file_size(client: Any) -> int:
    return int(persistence(client)["aof_current_size"])


def test_counters_of_a_period_expire_after_it(client: Any) -> None:
    client.eval(SETTLE, 1, state_key("k"), "k", "", "", str(PICO), "2026-01-31", "2026-01")
    kept = {key.rpartition("}:")[2].partition(":")[0]: client.ttl(key) for key in client.keys(f"{PREFIX}*")}

    assert kept["day"] > 86_400
    assert kept["month"] > 31 * 86_400


def today(client: Any) -> str:
    seconds, _ = client.time()
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")
