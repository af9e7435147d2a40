"""Carry out a Dockerfile's instructions without a container engine, in a scratch folder. No isolation, no user.

Every absolute path of the image that we write to lies below the folder; all stages share it, as they share the paths.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

OF_THE_IMAGE = re.compile(r"(?<![\w.:/])/(?=(?:opt|src|var)/|(?:opt|src|var)\b)")
_VARIABLE = re.compile(r"\$\{?(\w+)\}?")
RUN_LIMIT_S = 1500


@dataclass(frozen=True)
class Instruction:
    word: str
    options: Mapping[str, str]
    text: str


def parse(dockerfile: str) -> Iterator[Instruction]:
    """Parse instructions: comments left out, continued lines joined, `--name=value` options apart."""
    kept = "\n".join(line for line in dockerfile.splitlines() if not line.lstrip().startswith("#"))
    for line in filter(None, map(str.strip, re.sub(r"\\\n", " ", kept).splitlines())):
        word, text = line.split(maxsplit=1)
        options: dict[str, str] = {}
        while found := re.match(r"--([\w-]+)=(\S+)\s+", text):
            options[found[1]] = found[2]
            text = text[found.end() :]
        yield Instruction(word, options, text)


@dataclass
class Scratch:
    """Hold what an image would hold: files below `root`, and the settings of its last stage."""

    root: Path
    context: Path
    environ: dict[str, str] = field(default_factory=dict, repr=False)
    workdir: Path = Path("/")
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)
    user: str = "root"

    def carry_out(self, instruction: Instruction) -> None:
        getattr(self, f"_{instruction.word.lower()}", self._nothing)(instruction)

    def re_rooted(self, text: str) -> str:
        return OF_THE_IMAGE.sub(f"{self.root}/", text)

    def _nothing(self, instruction: Instruction) -> None:
        assert instruction.word in {"EXPOSE", "VOLUME"}, f"{instruction.word} is not known to this test"

    def _from(self, instruction: Instruction) -> None:
        assert re.match(r"python:3\.\d+\.\d+(-slim)?-\w+( AS \w+)?$", instruction.text)
        base = self.root / "base"
        base.mkdir(exist_ok=True)
        python = base / "python"
        python.write_text(f'#!/bin/sh\nexec {Path(sys.base_prefix) / "bin" / "python3"} "$@"\n')
        python.chmod(0o755)
        outer = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "UNIROUTE_", "MAKE"))
        }
        self.environ = {**outer, "PATH": f"{base}:{os.environ['PATH']}"}
        self.environ.pop("VIRTUAL_ENV", None)

    def _env(self, instruction: Instruction) -> None:
        for assignment in shlex.split(instruction.text):
            name, _, value = assignment.partition("=")
            expanded = _VARIABLE.sub(lambda found: self.environ[found[1]], self.re_rooted(value))
            self.environ[name] = expanded

    def _workdir(self, instruction: Instruction) -> None:
        self.workdir = Path(self.re_rooted(instruction.text))
        self.workdir.mkdir(parents=True, exist_ok=True)

    def _copy(self, instruction: Instruction) -> None:
        *sources, target = instruction.text.split()
        if "from" in instruction.options:
            assert sources == [target], "stages share their paths here"
            assert Path(self.re_rooted(target)).exists()
            return
        for source in sources:
            self._copy_in(self.context / source, self.workdir / target)

    def _copy_in(self, source: Path, target: Path) -> None:
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)

    def _run(self, instruction: Instruction) -> None:
        done = subprocess.run(
            ["/bin/sh", "-c", self.re_rooted(instruction.text)],
            cwd=self.workdir,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=RUN_LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, f"{instruction.text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"

    def _user(self, instruction: Instruction) -> None:
        self.user = instruction.text

    def _cmd(self, instruction: Instruction) -> None:
        self.command = json.loads(instruction.text)

    def _healthcheck(self, instruction: Instruction) -> None:
        self.healthcheck = json.loads(instruction.text.removeprefix("CMD "))
