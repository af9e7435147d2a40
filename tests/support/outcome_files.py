from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.bench.prompts import generated_prompts
from tests.support.command import run_command

Row = dict[str, Any]
PRICES = {"tiny": 1e-7, "small": 5e-7, "middle": 1e-6, "large": 5e-6}
# A model is right where the first word has one of its letters.
LETTERS = {"tiny": "xz", "small": "vw", "middle": "kq", "large": "aeiou"}
SMALL = ("--labels", "10,20", "--trials", "3", "--unseen", "0", "--workers", "1")


def rows(count: int = 120, *models: str) -> list[Row]:
    def scores(prompt: str) -> dict[str, float]:
        word = prompt.lower().split()[0]
        return {name: float(any(letter in word for letter in LETTERS[name])) for name in models or LETTERS}

    return [{"prompt": prompt, "scores": scores(prompt)} for prompt in generated_prompts(count)]


def write_files(folder: Path, lines: list[Row], *models: str) -> tuple[str, ...]:
    """Write the files and return the two options that name them."""
    outcomes, prices = folder / "outcomes.jsonl", folder / "prices.json"
    outcomes.write_text("".join(json.dumps(line) + "\n" for line in lines))
    costs = {name: PRICES[name] for name in models or PRICES}
    prices.write_text(
        json.dumps({name: {"input_cost_per_token": usd, "output_cost_per_token": usd} for name, usd in costs.items()})
    )
    return "--outcomes", str(outcomes), "--prices", str(prices)


def run(environ: Mapping[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_command("evaluate", *arguments, environ=environ)


def json_of(environ: Mapping[str, str], *arguments: str | Path) -> dict[str, Any]:
    """Return what `--json` prints: all of stdout is parsed."""
    ended = run(environ, *arguments, "--json")
    assert ended.returncode == 0, ended.stderr
    document: dict[str, Any] = json.loads(ended.stdout)
    return document


def error_line(ended: subprocess.CompletedProcess[str], status: int) -> str:
    """Return the one error line, beside progress; of bad options the parser's last line."""
    assert (ended.returncode, ended.stdout, "Traceback" in ended.stderr) == (status, "", False), ended.stderr
    lines = [line for line in ended.stderr.splitlines() if not re.match(r"embedding: |trials: ", line)]
    assert len(lines) == 1 or lines[0].startswith("Usage: "), ended.stderr
    return lines[-1]
