"""Compile `router_core/_compiled.c` where a wheel or an editable installation is made.

Where there is no compiler, or Python's headers are missing, it is left out with a warning, which `pip install -v`
shows, and NumPy computes the same: see `router_core/kernels.py`.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("router_core", "_compiled.c")

# The name that CPython gives modules which use the limited API alone: one file serves 3.11 and all later versions.
MODULE = Path("router_core", "_compiled.abi3.so")

# A fused multiply-add would round once where NumPy rounds twice.
EXACT = ("-O3", "-fno-fast-math", "-ffp-contract=off")

TIMEOUT_S = 120


class CannotCompile(Exception):
    """There is no compiler for this Python here, or it failed."""


class KernelsBuildHook(BuildHookInterface[Any]):
    """The hook that pyproject.toml names."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile into the wheel, or for an editable installation beside the source."""
        root = Path(self.root)
        if version == "editable":
            target = root / MODULE
        else:
            self._scratch = tempfile.TemporaryDirectory(prefix="uniroute-compiled-")
            target = Path(self._scratch.name) / MODULE.name
        try:
            compile_kernels(root / SOURCE, target)
        except CannotCompile as error:
            self.app.display_warning(f"{SOURCE} is left out, and NumPy does its work: {error}")
            return
        if version != "editable":
            build_data["force_include"][str(target)] = str(MODULE)
            build_data["pure_python"] = False
            build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        if version != "editable":
            self._scratch.cleanup()


def compile_kernels(source: Path, target: Path, flags: tuple[str, ...] = ()) -> None:
    """Compile `source` for this Python. `target` is replaced at once: processes that have it open keep theirs.

    `CC` and `CFLAGS` count as they do for setuptools.

    Raises:
        CannotCompile: it says why.
    """
    if sys.implementation.name != "cpython" or os.name != "posix" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise CannotCompile("it is written for CPython with a GIL, on Linux and macOS")
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    linking = ("-bundle", "-undefined", "dynamic_lookup") if sys.platform == "darwin" else ("-shared",)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    made = target.with_name(f".{target.name}.{os.getpid()}")
    command = [
        *compiler,
        *shlex.split(os.environ.get("CFLAGS", "")),
        *(*EXACT, "-fPIC", *linking, *flags),
        f"-I{sysconfig.get_path('include')}",
        f'-DSOURCE_SHA256="{digest}"',
        *(str(source), "-o", str(made), "-lm"),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)  # noqa: S603
        if done.returncode:
            raise CannotCompile(f"{compiler[0]} failed: {done.stderr.strip()[-500:]}")
        made.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotCompile(str(error)) from None
    finally:
        made.unlink(missing_ok=True)
