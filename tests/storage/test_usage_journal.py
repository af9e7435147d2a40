from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from proxy.storage import usage_journal as journals_module
from proxy.storage.usage_journal import Journal, JournalDirectory

LARGE = 10**9
WRITER = """
import os, signal, sys
from pathlib import Path
from proxy.storage.usage_journal import JournalDirectory
journals = JournalDirectory(Path(sys.argv[1]), 10**9)
for number in range(int(sys.argv[2])):
    journals.append('{"n": %d}' % number)
os.kill(os.getpid(), signal.SIGKILL)
"""


def a_text(number: int) -> str:
    return json.dumps({"n": number})


def read_all(journal: Journal, most: int = 10) -> list[int]:
    """Return the `n` of every record, each batch marked as applied."""
    found: list[int] = []
    while entries := (batch := journal.read(most)).entries:
        found += [entry.fields["n"] for entry in entries]
        journal.acknowledge(batch.last, batch.end)
    return found


def test_records_are_read_in_order_and_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for number in range(25):
        journal.append(a_text(number))
    assert [entry.sequence for entry in journal.read(3).entries] == [1, 2, 3]
    assert [entry.sequence for entry in journal.read(3).entries] == [1, 2, 3]  # until it is marked
    assert read_all(journal) == list(range(25))
    assert read_all(journal) == []
    assert journal.fully_applied
    journal.append(a_text(25))
    assert (journal.fully_applied, read_all(journal)) == (False, [25])


def test_a_killed_process_leaves_every_record_to_the_next(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", WRITER, str(tmp_path), "500"], check=False)
    assert killed.returncode == -signal.SIGKILL

    journals = JournalDirectory(tmp_path, LARGE)
    journals.claim_orphans()
    (left, _) = journals.all
    assert read_all(left, 200) == list(range(500))


def test_a_journal_in_use_is_not_claimed(tmp_path: Path) -> None:
    ours, theirs = JournalDirectory(tmp_path, LARGE), JournalDirectory(tmp_path, LARGE)
    ours.append(a_text(0))
    theirs.claim_orphans()
    assert len(theirs.all) == 1
    ours.close()
    theirs.claim_orphans()
    assert read_all(theirs.all[0]) == [0]


def test_only_one_process_claims_a_journal(tmp_path: Path) -> None:
    first, second, third = (JournalDirectory(tmp_path, LARGE) for _ in range(3))
    first.append(a_text(0))
    first.close()
    second.claim_orphans()
    third.claim_orphans()
    assert (len(second.all), len(third.all)) == (2, 1)


def test_a_journal_that_was_finished_while_it_was_being_opened_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dead.jsonl").write_text('{"seq": 1, "n": 1}\n')

    def lock_late(file: int, how: int) -> None:
        (tmp_path / "dead.jsonl").unlink()  # by the process that had the lock until now

    monkeypatch.setattr("proxy.storage.usage_journal.fcntl.flock", lock_late)
    assert Journal.claim_orphan(tmp_path / "dead.jsonl") is None


def test_a_truncated_line_and_a_line_of_garbage_lose_no_other_record(tmp_path: Path) -> None:
    whole = b'{"seq": 1, "n": 1}\n\x00\xff garbage\n{"seq": 2, "n": 2}\n{"seq": 3, "n"'
    (tmp_path / "dead.jsonl").write_bytes(whole)
    journal = Journal.claim_orphan(tmp_path / "dead.jsonl")
    assert journal is not None
    batch = journal.read(10)
    assert ([entry.fields["n"] for entry in batch.entries], batch.broken) == ([1, 2], 1)
    journal.acknowledge(batch.last, batch.end)
    assert (journal.read(10).entries, journal.read(10).broken) == ([], 0)


def test_lines_that_the_json_module_wrote_are_read(tmp_path: Path) -> None:
    odd: list[dict[str, Any]] = [{"n": float("inf")}, {"n": "\ud800"}, {"n": None, "more": [1.5, "é"]}]
    lines = [json.dumps({"seq": place, **fields}) for place, fields in enumerate(odd, 1)]
    (tmp_path / "dead.jsonl").write_text("\n".join(lines) + "\n")
    journal = Journal.claim_orphan(tmp_path / "dead.jsonl")
    assert journal is not None
    assert [entry.fields["n"] for entry in journal.read(10).entries] == [float("inf"), "\ud800", None]


def test_a_line_that_is_too_long_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "dead.jsonl").write_bytes(b"x" * 600_000 + b'\n{"seq": 2, "n": 2}\n')
    journal = Journal.claim_orphan(tmp_path / "dead.jsonl")
    assert journal is not None
    assert [entry.fields["n"] for entry in journal.read(10).entries] == [2]


def test_after_a_rewind_the_later_records_are_read_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for number in range(5):
        journal.append(a_text(number))
    read_all(journal)
    journal.rewind(2)
    assert read_all(journal) == [2, 3, 4]


def test_a_disk_that_takes_half_a_line_or_nothing_loses_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk, as the kernel shows it to a process: a part of the line, then none of it."""
    real, room = os.write, [len(b'{"seq": 1, "n": 0}\n') + 7]

    def write(file: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        taken = real(file, data[: room[0]])
        room[0] -= taken
        return taken

    monkeypatch.setattr("proxy.storage.usage_journal.os.write", write)
    journals = JournalDirectory(tmp_path, LARGE)
    for number in range(4):
        assert journals.append(a_text(number))
    (journal,) = journals.all
    assert journal.path.read_bytes() == b'{"seq": 1, "n": 0}\n'
    assert [entry.fields["n"] for entry in journal.read(10).entries] == [0, 1, 2, 3]
    assert [record.levelname for record in caplog.records] == ["ERROR"]  # one line, however many records

    room[0] = 10**6
    journals.write_unwritten()
    assert (journals.append(a_text(4)), read_all(journal)) == (True, [0, 1, 2, 3, 4])
    assert journal.path.read_bytes().count(b"\n") == 5


def test_records_wait_in_memory_where_the_folder_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "usage").write_text("a file is in the way")
    journals = JournalDirectory(tmp_path / "usage", LARGE)
    assert journals.append(a_text(0))
    assert [entry.fields["n"] for entry in journals.all[0].read(10).entries] == [0]
    (tmp_path / "usage").unlink()
    journals.write_unwritten()
    assert journals.bytes > 0


def test_memory_is_bounded_and_dropped_records_are_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals_module, "MAX_UNWRITTEN", 3)
    (tmp_path / "usage").write_text("a file is in the way")
    journals = JournalDirectory(tmp_path / "usage", LARGE)
    assert [journals.append(a_text(number)) for number in range(5)] == [True] * 3 + [False] * 2
    assert journals.close() == 3


def test_new_records_are_dropped_when_the_journals_are_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journals = JournalDirectory(tmp_path, 2000)
    kept = [journals.append(a_text(number)) for number in range(200)]
    assert kept == sorted(kept, reverse=True)
    assert 0 < journals.bytes <= 2000
    found: list[Any] = [number for journal in journals.all for number in read_all(journal)]
    assert found == list(range(sum(kept)))
    assert len([record for record in caplog.records if "dropped" in record.message]) == 1

    for journal in journals.all[:-1]:
        journals.remove(journal)
    assert journals.append(a_text(0))


def test_the_size_of_the_journals_is_that_of_their_files(tmp_path: Path) -> None:
    left = JournalDirectory(tmp_path, LARGE)
    left.append(a_text(0))
    left.close()
    journals = JournalDirectory(tmp_path, 4000)
    for number in range(100):
        journals.append(a_text(number))
        assert journals.bytes == sum(journal.size for journal in journals.all)
    journals.claim_orphans()
    assert len(journals.all) > 2
    assert journals.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    for journal in journals.all:
        journals.remove(journal)
        assert journals.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
