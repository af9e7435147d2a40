"""Write the ledger of an upstream: one line before a response begins, and one before its last bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Attempt:
    """Hold one request that an upstream received."""

    id: str
    question: str
    model: str
    behaviour: str
    usage: Mapping[str, Any] | None
    """What it reports where it gets that far; None: it reports nothing."""
    whole: bool = False
    """All but the last bytes were handed over, and nothing was left that could go wrong but those."""


class Ledger:
    """Write a ledger from one process at a time. A line is one write, so that no kill cuts it."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._received = 0

    def began(self, question: str, model: str, behaviour: str, usage: Mapping[str, Any] | None) -> str:
        self._received += 1
        attempt = f"{os.getpid()}-{self._received}"
        self._write(
            {"attempt": attempt, "question": question, "model": model, "behaviour": behaviour, "usage": usage},
        )
        return attempt

    def whole(self, attempt: str) -> None:
        """Write that the last bytes follow."""
        self._write({"whole": attempt})

    def _write(self, line: Mapping[str, Any]) -> None:
        os.write(self._file, json.dumps(line).encode() + b"\n")


def read_ledger(*paths: Path) -> list[Attempt]:
    attempts: dict[str, Attempt] = {}
    for path in paths:
        for text in path.read_text().splitlines():
            line = json.loads(text)
            if "whole" in line:
                attempts[line["whole"]] = replace(attempts[line["whole"]], whole=True)
                continue
            attempts[line["attempt"]] = Attempt(
                line["attempt"], line["question"], line["model"], line["behaviour"], line["usage"]
            )
    return list(attempts.values())
