"""Run litellm in a process of its own: without any key, once per model."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxy.errors import ServiceUnavailable
from proxy.settings.model_config import ModelInfo
from proxy.storage.records import ModelRecord, ResolvedProvider
from proxy.upstream import litellm_resolver as lookup
from proxy.upstream.client import is_direct
from proxy.upstream.provider_resolution import CACHE_FILE, Resolver
from tests.support.makers import a_record
from tests.support.processes import children_of
from tests.support.waiting import until

NEAR = "http://127.0.0.1:9/v1"
CANARY = "sk-canary-of-the-environment"


def a_model(**params: Any) -> ModelRecord:
    return replace(a_record("m"), litellm_params=params, info=ModelInfo(free=True))


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


@pytest.fixture
def scripted_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace Python by a script that writes its environment to a file and then runs another."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\nenv > {tmp_path}/environ\necho >> {tmp_path}/asked\n. {tmp_path}/then\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return tmp_path


def answering(folder: Path, answer: Any) -> None:
    """Give the same answer to each query."""
    (folder / "answer").write_text(json.dumps(answer) + "\n")
    (folder / "then").write_text(f"while read question; do cat {folder}/answer; done")


ONE = a_model(model="groq/x", api_base=NEAR)
DYING = ["exit 3", "kill -9 $$", "exec sleep 60"]
DYING += [f"read question; echo '{line}'" for line in ("nonsense", "[]", "7", "{}", '{"resolved": {}}')]
DYING += ['read question; printf \'{"refused": "no"}\'', "head -c 3000000 /dev/zero", "exec cat"]
FOUND = ResolvedProvider("relay", "x", "groq", NEAR, "GROQ_API_KEY")
ANSWER = {"resolved": FOUND.to_json()}


async def test_no_key_is_in_the_environment_of_the_child(
    scripted_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GROQ_API_KEY", CANARY)
    monkeypatch.setenv("SOME_SECRET", CANARY)
    answering(scripted_python, ANSWER)
    environ = {"GROQ_API_KEY": CANARY, "GROQ_API_BASE": "http://base", "UNIROUTE_ADMIN_KEY": CANARY}
    await Resolver(scripted_python / "data", environ).resolve(
        a_model(model="groq/x", api_base=NEAR, api_key="os.environ/GROQ_API_KEY")
    )
    seen = (scripted_python / "environ").read_text()

    assert "GROQ_API_BASE=http://base\n" in seen
    assert "LITELLM_MODE=PRODUCTION\n" in seen  # else it reads a .env file
    assert CANARY not in seen


async def test_a_resolved_provider_is_cached(scripted_python: Path) -> None:
    answering(scripted_python, ANSWER)
    first = await Resolver(scripted_python / "data", {}).resolve(ONE)
    again = await Resolver(scripted_python / "data", {}).resolve(ONE)
    assert (first.resolved, (scripted_python / "asked").read_text()) == (again.resolved, "\n")

    await Resolver(scripted_python / "data", {"GROQ_API_BASE": "http://other"}).resolve(ONE)
    assert (scripted_python / "asked").read_text() == "\n\n"


@pytest.mark.parametrize(
    "broken",
    ["", "{", "[]", "7", "null", "\x00", '{"%s": 7}', '{"%s": {}}', '{"%s": {"resolved": {"way": "relay"}}}',
     '{"%s": {"resolved": {"way": "astray"}}}', '{"%s": {"refused": 5}}'],
)  # fmt: skip
async def test_a_broken_cache_file_is_ignored(scripted_python: Path, broken: str) -> None:
    answering(scripted_python, ANSWER)
    await Resolver(scripted_python / "data", {}).resolve(ONE)
    (mark,) = json.loads((scripted_python / "data" / CACHE_FILE).read_text())
    (scripted_python / "data" / CACHE_FILE).write_text(broken.replace("%s", mark))

    assert (await Resolver(scripted_python / "data", {}).resolve(ONE)).resolved == FOUND
    assert json.loads((scripted_python / "data" / CACHE_FILE).read_text()) == {mark: ANSWER}


async def test_several_resolvers_at_once_write_one_file(scripted_python: Path) -> None:
    answering(scripted_python, ANSWER)
    records = [a_model(model=f"groq/{number}", api_base=NEAR) for number in range(12)]
    one, other = Resolver(scripted_python / "data", {}), Resolver(scripted_python / "data", {})
    asking = [resolver.resolve(record) for record in records for resolver in (one, other)]
    assert all(record.resolved == FOUND for record in await asyncio.gather(*asking))

    assert (scripted_python / "asked").read_text() == "\n"
    assert len(json.loads((scripted_python / "data" / CACHE_FILE).read_text())) == 12
    assert {path.name for path in (scripted_python / "data").iterdir()} == {
        CACHE_FILE,
        "providers.lock",
        "providers.turn",
    }
    await one.aclose()


async def test_eight_models_at_once_are_resolved_by_one_child_that_ends_when_idle(
    scripted_python: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lookup, "IDLE_S", 0.05)
    caplog.set_level("INFO")
    answering(scripted_python, ANSWER)
    resolver = Resolver(scripted_python / "data", {})
    asking = [asyncio.create_task(resolver.resolve(a_model(model=f"groq/{n}", api_base=NEAR))) for n in range(8)]
    await asyncio.sleep(0)
    waiting = resolver.waiting
    await asyncio.gather(*asking)

    assert (waiting, resolver.waiting, (scripted_python / "asked").read_text()) == (8, 0, "\n")
    assert "looked up after those of 7 other models" in caplog.text
    await until(lambda: "litellm said who serves 8 models" in caplog.text)
    await resolver.resolve(a_model(model="groq/later", api_base=NEAR))
    assert (scripted_python / "asked").read_text() == "\n\n"
    await resolver.aclose()


async def test_a_child_that_ends_without_an_answer_fails_all_queries_at_once(scripted_python: Path) -> None:
    (scripted_python / "then").write_text("exit 3")
    resolver = Resolver(scripted_python / "data", {})
    asking = [resolver.resolve(a_model(model=f"groq/{n}", api_base=NEAR)) for n in range(8)]
    ended = await asyncio.gather(*asking, return_exceptions=True)

    assert {type(each) for each in ended} == {ServiceUnavailable}
    assert (scripted_python / "asked").read_text() == "\n"


async def test_a_query_that_kills_the_child_fails_no_other_query(scripted_python: Path) -> None:
    answering(scripted_python, ANSWER)
    dying = f"while read question; do case $question in *deadly*) exit 1;; esac; cat {scripted_python}/answer; done"
    (scripted_python / "then").write_text(dying)
    resolver = Resolver(scripted_python / "data", {})
    asking = [resolver.resolve(a_model(model=f"groq/{name}", api_base=NEAR)) for name in ("a", "deadly", "b")]
    first, deadly, last = await asyncio.gather(*asking, return_exceptions=True)

    assert isinstance(deadly, ServiceUnavailable)
    assert isinstance(first, ModelRecord)
    assert isinstance(last, ModelRecord)
    assert (first.resolved, last.resolved) == (FOUND, FOUND)
    await resolver.aclose()


async def test_a_cancelled_query_does_not_disturb_the_others(scripted_python: Path) -> None:
    answering(scripted_python, ANSWER)
    resolver = Resolver(scripted_python / "data", {})
    leaving = asyncio.create_task(resolver.resolve(ONE))
    await asyncio.sleep(0)
    staying = asyncio.create_task(resolver.resolve(a_model(model="groq/y", api_base=NEAR)))
    leaving.cancel()

    assert (await staying).resolved == FOUND
    assert (scripted_python / "asked").read_text() == "\n"
    await resolver.aclose()


async def test_closing_the_resolver_ends_the_child(scripted_python: Path) -> None:
    (scripted_python / "then").write_text("exec sleep 60")
    resolver = Resolver(scripted_python / "data", {})
    asking = asyncio.create_task(resolver.resolve(ONE))
    await until(lambda: (scripted_python / "asked").exists())
    await resolver.aclose()

    with pytest.raises(ServiceUnavailable, match="this process ends"):
        await asking
    assert not children_of(os.getpid())


async def test_too_many_queries_are_rejected(scripted_python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "MAX_WAITING", 1)
    answering(scripted_python, ANSWER)
    resolver = Resolver(scripted_python / "data", {})
    records = [a_model(model=f"groq/{n}", api_base=NEAR) for n in range(2)]
    ended = await asyncio.gather(*map(resolver.resolve, records), return_exceptions=True)

    assert "1 others wait for it" in str(ended[1])
    await resolver.aclose()


def test_the_memory_of_the_child_is_limited() -> None:
    """The limit itself: what asks for more fails in that process."""
    program = (
        "from proxy.upstream import litellm_resolver as resolver\n"
        "resolver.MAX_MEMORY_BYTES = 300 * 2**20; resolver.limit_memory()\n"
        "try: bytearray(2**29)\nexcept MemoryError: print('bounded')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert ended.stdout == "bounded\n"


async def test_two_processes_at_once_write_one_file(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys, json; from pathlib import Path; from proxy.upstream.provider_resolution import Resolver\n"
        "resolver = Resolver(Path(sys.argv[1]), {})\n"
        "for number in range(200): resolver._store({f'{sys.argv[2]}-{number}': {'refused': 'no'}})\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    running = [await asyncio.create_subprocess_exec(*command, name) for name in ("a", "b")]

    assert [await each.wait() for each in running] == [0, 0]
    assert len(json.loads((tmp_path / CACHE_FILE).read_text())) == 400


async def test_a_provider_is_resolved_without_a_writable_folder(scripted_python: Path) -> None:
    answering(scripted_python, ANSWER)
    (scripted_python / "data").write_text("a file")

    assert (await Resolver(scripted_python / "data", {}).resolve(ONE)).resolved is not None


@pytest.mark.parametrize("then", DYING)
async def test_a_failed_lookup_is_a_503_and_at_start_means_litellm(
    scripted_python: Path, monkeypatch: pytest.MonkeyPatch, then: str, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lookup, "START_TIMEOUT_S", 0.3)
    (scripted_python / "then").write_text(then)
    resolver = Resolver(scripted_python / "data", {})
    with pytest.raises(ServiceUnavailable, match="provider of m could not be looked up"):
        await resolver.resolve(ONE)
    odd, plain = await resolver.resolve_all([ONE, a_model(model="openai/x", api_base=NEAR)])

    assert (odd, is_direct(odd)) == (ONE, None)
    assert plain.resolved == ResolvedProvider("relay", "x", "openai", NEAR)
    assert "models are translated" in caplog.text
    assert not (scripted_python / "data" / CACHE_FILE).exists()
    assert not [pid for pid in children_of(os.getpid()) if "sleep" in command_of(pid)]


async def test_a_child_that_cannot_be_started_is_a_503(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(ServiceUnavailable):
        await Resolver(tmp_path, {}).resolve(ONE)
