from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor

from proxy.server.requests import random_id


def test_an_id_has_128_bits_in_hex() -> None:
    assert all(re.fullmatch("[0-9a-f]{32}", random_id()) for _ in range(300))


def test_threads_never_get_the_same_id() -> None:
    with ThreadPoolExecutor(8) as threads:
        lists = list(threads.map(lambda _: [random_id() for _ in range(2000)], range(16)))
    assert len({drawn for ids in lists for drawn in ids}) == 16 * 2000


def test_a_forked_process_draws_other_ids_than_its_parent() -> None:
    random_id()  # others of the same draw are left
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.write(writing, "".join(random_id() for _ in range(10)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(reading, 320).decode()
    os.close(reading)
    os.close(writing)
    assert len(theirs) == 320
    assert not {theirs[place : place + 32] for place in range(0, 320, 32)} & {random_id() for _ in range(127)}
