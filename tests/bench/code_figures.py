"""Count files, lines, imports and names of the code: `python -m tests.bench.code_figures`.

The figures come from the sources. The files that a request enters are counted while one is served: see request_walk.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import itertools
import json
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.request_walk import PACKAGES, ROOT, Walk, walks, weightless

# Participles that the field uses as nouns.
FIELD_GERUNDS = frozenset(
    ("settings", "routing", "streaming", "embedding", "clustering", "scoring", "fitting", "pricing")
) | {"profiling", "grading", "loading"}
NOUNS = frozenset({"feed"})
_COMPARATIVE = re.compile(r"(?:_|\b)(MOST|LARGEST|LONGEST|FEWEST|SHORTEST)_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--static", action="store_true", help="serve no request")
    parser.add_argument("--files", action="store_true", help="name the files that each request enters")
    parser.add_argument("--embedder", type=Path, default=ROOT / ".cache" / "embedder", help="where a table is already")
    arguments = parser.parse_args()
    figures: dict[str, Any] = static_figures()
    requests = {} if arguments.static else requests_walked(arguments.embedder)
    figures["requests"] = {kind: summary(walk) for kind, walk in requests.items()}
    print(json.dumps(figures, indent=2) if arguments.json else text_of(figures, files=arguments.files))  # noqa: T201


def static_figures() -> dict[str, Any]:
    found: dict[str, Any] = {package: package_figures(sorted((ROOT / package).rglob("*.py"))) for package in PACKAGES}
    found["tests"] = package_figures(sorted((ROOT / "tests").rglob("*.py")))
    found["README lines"] = len((ROOT / "README.md").read_text("utf-8").splitlines())
    entries = [path.name for path in (ROOT / "proxy").iterdir() if not path.name.startswith(("__", "."))]
    found["entries at the top of proxy"] = len([name for name in entries if name != "py.typed"])
    return found


def package_figures(paths: Sequence[Path]) -> dict[str, Any]:
    texts = {path: path.read_text("utf-8") for path in paths}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    lines = {path: len(text.splitlines()) for path, text in texts.items()}
    imports = sum(import_lines(tree) for tree in trees.values())
    return {
        "files": len(paths),
        "median lines": statistics.median(lines.values()),
        "lines": sum(lines.values()),
        "share of import lines": round(imports / sum(lines.values()), 4),
        "file heads": sum(ast.get_docstring(tree) is not None for tree in trees.values()),
        "comparative constants": sorted(name for tree in trees.values() for name in comparative_constants(tree)),
        "participles": [path.relative_to(ROOT).as_posix() for path in paths if is_participle(path.stem)],
    }


def import_lines(tree: ast.Module) -> int:
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return sum((node.end_lineno or node.lineno) - node.lineno + 1 for node in imports)


def comparative_constants(tree: ast.Module) -> list[str]:
    assigned = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    targets = [
        target for node in assigned for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    names = [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]
    return [name for name in names if _COMPARATIVE.search(name)]


def is_participle(stem: str) -> bool:
    """Tell whether the last word of a module's name is a participle."""
    word = stem.removeprefix("test_").rpartition("_")[2]
    return word.endswith(("ing", "ed")) and word not in FIELD_GERUNDS | NOUNS


def requests_walked(embedder: Path) -> dict[str, Walk]:
    with tempfile.TemporaryDirectory(prefix="uniroute-figures-") as name:
        folder = Path(name)
        for table in embedder.glob("static-*"):
            (folder / table.name).symlink_to(table.resolve())
        return asyncio.run(walks(folder))


def summary(walk: Walk) -> dict[str, Any]:
    entered = [function.file for function in walk.entered]
    moves = [after for before, after in itertools.pairwise(entered) if before != after]
    return {
        "files": len(walk.files),
        "of proxy": sum(file.startswith("proxy/") for file in walk.files),
        "functions": len(walk.functions),
        "calls": len(entered),
        "moves between files": len(moves),
        "weightless": [f"{function.file}:{function.name}" for function in weightless(walk.functions)],
        "names": walk.files,
    }


def text_of(figures: Mapping[str, Any], *, files: bool) -> str:
    lines = []
    for package in (*PACKAGES, "tests"):
        sums = {name: len(value) if isinstance(value, list) else value for name, value in figures[package].items()}
        lines.append(f"{package}: " + ", ".join(f"{name} {value}" for name, value in sums.items()))
        lines += [
            f"  {name}: {', '.join(value)}"
            for name, value in figures[package].items()
            if value and files and isinstance(value, list)
        ]
    lines += [f"{name}: {figures[name]}" for name in ("entries at the top of proxy", "README lines")]
    for kind, walk in figures["requests"].items():
        counts = ", ".join(f"{name} {value}" for name, value in walk.items() if not isinstance(value, list))
        lines.append(f"{kind}: {counts}")
        lines += [f"  weightless: {name}" for name in walk["weightless"]]
        lines += [f"  {name}" for name in walk["names"] if files]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
