"""The compiled kernels of the source as it is, whichever are installed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from hatch_build import CannotCompile, compile_kernels
from router_core import kernels
from router_core.kernels import SOURCE, Kernels
from tests.conftest import CACHE


@cache
def compiled_kernels() -> Kernels:
    """Compile them, once for each version of the source, or skip the test: there is no compiler.

    UNIROUTE_TEST_KERNELS names others, which were compiled with sanitizers.
    """
    if stated := os.environ.get("UNIROUTE_TEST_KERNELS"):
        return load_kernels(Path(stated))
    folder = CACHE.parent / "compiled" / hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    target = folder / "_compiled.abi3.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            compile_kernels(SOURCE, target)
        except CannotCompile as error:
            pytest.skip(f"the kernels cannot be compiled here: {error}")
    return load_kernels(target)


def load_kernels(path: Path) -> Kernels:
    name = "router_core._compiled"
    spec = spec_from_file_location(name, path, loader=ExtensionFileLoader(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module: Any = module_from_spec(spec)
    spec.loader.exec_module(module)
    return Kernels("compiled", module.TokenTable, module.softmax, module.Scorer)


# To be tested alike.
BOTH = ("NumPy", "compiled")


def kernels_named(name: str) -> Kernels:
    """Return one of BOTH, or skip the test."""
    return kernels.NUMPY if name == "NumPy" else compiled_kernels()


@contextmanager
def using(chosen: Kernels) -> Iterator[None]:
    """Make embedders, maps and pools with these kernels while the context lasts."""
    kernels.use(chosen)
    try:
        yield
    finally:
        kernels.use(None)
