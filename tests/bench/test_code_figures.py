from __future__ import annotations

import ast

import pytest

from tests.bench.code_figures import comparative_constants, import_lines, is_participle
from tests.bench.request_walk import only_passes_on


@pytest.mark.parametrize(
    ("source", "weightless"),
    [
        ("def path_of(scope):\n    return get_route_path(scope)", True),
        ('async def ask(self, name):\n    """Ask."""\n    return await self.client.ask(name, again=True)', True),
        ("@property\ndef current(self):\n    return self._current", True),
        ("def size(self, text):\n    return len(text.encode())", False),
        ("def close(self):\n    self.stop()\n    self.release()", False),
        ("def __len__(self):\n    return count(self)", False),
    ],
)
def test_a_function_that_only_passes_on_is_weightless(source: str, weightless: bool) -> None:
    defined = ast.parse(source).body[0]
    assert isinstance(defined, ast.FunctionDef | ast.AsyncFunctionDef)
    assert only_passes_on(defined) is weightless


def test_lines_of_imports_are_counted_whole() -> None:
    assert import_lines(ast.parse("import os\nfrom a import (\n    b,\n    c,\n)\nx = 1\n")) == 5


def test_comparatives_are_found_among_constants_alone() -> None:
    tree = ast.parse("MOST_HELD = 1\n_LONGEST_S: float = 2\nMAX_HELD = 3\ndef f():\n    MOST_X = 4\n")
    assert comparative_constants(tree) == ["MOST_HELD", "_LONGEST_S"]


@pytest.mark.parametrize(("stem", "participle"), [("assigning", True), ("test_audited", True), ("price_feed", False)])
def test_the_gerunds_of_the_field_are_no_participles(stem: str, participle: bool) -> None:
    assert is_participle(stem) is participle
    assert not is_participle("scoring")
