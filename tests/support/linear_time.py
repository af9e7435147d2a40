"""Texts on which a careless parser takes quadratic time, and a child process whose CPU time is too short for that."""

from __future__ import annotations

import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping

from tests.support.program import ROOT

CHARACTERS = 20_000
# For one reader and four units: a linear reader needs tenths of a second for them.
CPU_S = 4
# Of each kind one.
FEW = (" ", ".", "({[", '"', "\\", "1", "-", "<think>", "```", "\u0301\u0316", "_cost_per_", "{[(\"'`\\* -1")
MANY = (
    "\n", "(", "{", "[[", "'", "answer", "\t", "\xa0", "\r\n", " \n", "{}", "[]", '{"a":', "[1,", '"a",', '"\\u0041',
    "`", "```\n", "“", '\'"“«`', "'a' ", "'a", "\\boxed{", "\\boxed{{a}", "\\boxed ", "\\frac{1}{", "\\text{a", "*",
    "**a", "**a**", "_", "—", "=", ":", ",", "…", '."', ".)", "?'", "\u3002", "!x", "123,", "1.", "1 ", "123 ", "1e",
    "1/", "1%", "1x10^", "-1", "</think>", "<a>", "<", "&", "<!--", "answer ", "answer of a", "answer to ",
    "answer (", "answer:", "\u7b54\u6848", "\u7b54\u6848\u662f", "option is", "A) ", "respuesta correcta ",
    "option ", "(A", "A", "A - ", "A\n", "score:", "score ", '"score": 1/', "SELECT ", "SELECT (", "/*", ";",
    "def f(n):\n", "def f(n):\n f(", "lambda:", "not ", 'f"{', '"""', "x.", "Mr.", "U.S.", "word ", "a\u0301\u0316",
    "\u0f73", "\ufdfa", "\uff11", "\u4e2d", "\u304b", "\u200b", "\ud800", "\U0001f600", "İ", "\x00", "%7B%7B",
    "_cost_per_", "secret", "exceeds ", "maximum ", "litellm.a", "a.", "a:", "https://a.", "data:", "event: a\n",
    "api_key_",
)  # fmt: skip
_AROUND = (("", ""), ("The answer", "x"), ("", "\nx"), ("option", "x"), ("```\n", "\n"), ("score", "x"))


def shapes(units: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield a name and 20,000 characters: each unit over and over, alone and between words that readers look for."""
    for unit in units:
        for before, after in _AROUND if unit in (" ", "_cost_per_") else _AROUND[:2]:
            middle = CHARACTERS - len(before) - len(after)
            yield repr((before, unit, after)), before + (unit * middle)[:middle] + after


def stopped_at(module: str, units: str) -> str:
    """Run `module` under the limit; return what it was reading when the kernel killed it, empty if it ended."""
    command = [sys.executable, "-W", "error", "-m", module, units]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return (
        "" if child.returncode == 0 else f"{child.stdout.splitlines()[-1:]}: {child.returncode} {child.stderr[-2000:]}"
    )


def read_all(readers: Mapping[str, Callable[[str], object]], units: str) -> None:
    """Give every shape of `few` or `many` units to every reader, and print the name before each."""
    chosen = FEW if units == "few" else MANY
    for name, read in readers.items():
        for place in range(0, len(chosen), 4):
            _limit_cpu(CPU_S)
            for shape, text in shapes(chosen[place : place + 4]):
                sys.stdout.write(f"{name} {shape}\n")
                sys.stdout.flush()
                read(text)


def _limit_cpu(cpu_s: int) -> None:
    """Allow so many more seconds of CPU time; those used are rounded up."""
    used = math.ceil(sum(os.times()[:2]))
    resource.setrlimit(resource.RLIMIT_CPU, (used + cpu_s, resource.RLIM_INFINITY))
