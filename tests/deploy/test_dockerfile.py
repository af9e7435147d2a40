from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.deploy.dockerfile import Scratch, parse
from tests.support.ports import free_port
from tests.test_house import ROOT

DOCKERFILE = ROOT / "deploy" / "Dockerfile"
HADOLINT = Path(sys.executable).parent / "hadolint"
STARTS_WITHIN_S = 60.0


def last_stage() -> list[tuple[str, str]]:
    instructions = [(each.word, each.text) for each in parse(DOCKERFILE.read_text("utf-8"))]
    return instructions[max(index for index, (word, _) in enumerate(instructions) if word == "FROM") :]


def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run([HADOLINT, "--no-color", DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_would_say_something(tmp_path: Path) -> None:
    careless = tmp_path / "Dockerfile"
    careless.write_text("FROM python\nRUN pip install torch\n")
    done = subprocess.run([HADOLINT, "--no-color", careless], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "DL3006" in done.stdout


def test_the_last_stage_runs_as_a_user_without_a_name_and_is_checked() -> None:
    stage = last_stage()
    words = [word for word, _ in stage]
    assert dict(stage)["USER"] == "10001:10001"
    assert words.index("USER") < words.index("CMD")
    assert "curl" not in dict(stage)["HEALTHCHECK"]
    assert "RUN" not in words  # what was needed to build stays in the stage before


def test_what_the_image_copies_is_let_through_by_the_ignore_file() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    instructions = parse(DOCKERFILE.read_text("utf-8"))
    copied = [each.text.split()[:-1] for each in instructions if each.word == "COPY" and "from" not in each.options]
    assert {source for sources in copied for source in sources} == allowed


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scratch]:
    """Build the image's files by the Dockerfile's own instructions: a few minutes, two gigabytes."""
    scratch = Scratch(tmp_path_factory.mktemp("image"), ROOT)
    for instruction in parse(DOCKERFILE.read_text("utf-8")):
        scratch.carry_out(instruction)
    yield scratch
    shutil.rmtree(scratch.root)


def run(image: Scratch, command: list[str], environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    environ = {**image.environ, **environ}
    return subprocess.run(
        command, cwd=image.workdir, env=environ, capture_output=True, text=True, timeout=60, check=False
    )


def files_below(folder: Path) -> dict[Path, int]:
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_embedding_table_is_in_the_image(image: Scratch) -> None:
    assert [path.name for path in (image.root / "var/lib/uniroute").glob("static-*/*.npy")] == ["table.npy"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_commands_of_the_dockerfile_make_a_server_that_its_health_check_passes(
    image: Scratch, tmp_path: Path
) -> None:
    read_only = files_below(image.root / "opt")
    on_loopback = {"UNIROUTE_HOST": "127.0.0.1", "UNIROUTE_PORT": str(free_port()), "TMPDIR": str(tmp_path)}
    server = subprocess.Popen(image.command, cwd=image.workdir, env={**image.environ, **on_loopback})
    try:
        deadline = time.monotonic() + STARTS_WITHIN_S
        while run(image, image.healthcheck, on_loopback).returncode != 0:
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the health check never passed"
        server.send_signal(signal.SIGTERM)
        assert server.wait(120) == 0
    finally:
        server.kill()
        server.wait()
    assert files_below(image.root / "opt") == read_only  # so the image's root can be mounted read-only


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_container_refuses_to_be_reached_by_others_before_a_client_key_exists(image: Scratch) -> None:
    done = run(image, image.command, {"UNIROUTE_PORT": str(free_port())})
    assert done.returncode == 2
    assert "uniroute keys create" in done.stderr
