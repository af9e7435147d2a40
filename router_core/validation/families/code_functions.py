"""Write a function from one line of purpose, a name and arguments. Answers are parsed, never run."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from router_core.validation.families.helpers import LONG, Draft, Section
from router_core.validation.families.tables import read_rows
from router_core.validation.graders import PythonGrader

_FRAMES = (
    "Write a function to {aim}. Call it {head}.",
    "Write a python function to {aim}: {head}",
    "Write a function to {aim}.\n\nSignature: def {head}",
    "Write a python function {head} to {aim}. Code only, please.",
)


def _functions(rng: Random) -> Iterator[Draft]:
    rows = read_rows("code_functions")
    for level, head, aim, result in rng.sample(rows, len(rows)):
        name, _, arguments = head.rstrip(")").partition("(")
        grader = PythonGrader(name, tuple(arguments.split(", ")), uses=("return",))
        text = rng.choice(_FRAMES).format(aim=aim, head=head)
        yield Draft(text, grader, f"```python\ndef {head}:\n    return {result}\n```", int(level), LONG)


SECTIONS = (Section("code_functions", None, _functions, family="code_writing"),)
