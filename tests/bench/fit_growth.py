"""Measure time and peak memory of `uniroute fit` against the number of prompts: `python -m tests.bench.fit_growth`.

Each size is fitted by the command in a process of its own, so that each peak is its own. Prompts are generated.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from proxy.cli import console
from router_core.embedding import static_embedder
from tests.bench.prompts import write_prompts

SIZES = (10_000, 100_000, 1_000_000)
# Of `ru_maxrss`, which is in KiB on Linux and in bytes on macOS.
KIB_PER_MIB = 1024 if sys.platform != "darwin" else 1024 * 1024


@dataclass(frozen=True, slots=True)
class Cost:
    seconds: float
    peak_mib: float


def main() -> None:
    arguments = _arguments()
    rows = []
    with tempfile.TemporaryDirectory(prefix="uniroute-bench-") as folder:
        static_embedder(arguments.data_dir or Path(folder), console.echo_err)
        for size in arguments.prompts:
            prompts = Path(folder) / "prompts.jsonl"
            write_prompts(prompts, size)
            console.echo_err(f"{size:,} prompts, {prompts.stat().st_size / 1e6:,.0f} MB")
            cost = _cost_of(_command(arguments, prompts, Path(folder) / f"map-{size}"))
            rows.append((f"{size:,}", f"{cost.seconds:.1f}", f"{size / cost.seconds:,.0f}", f"{cost.peak_mib:,.0f}"))
    console.table(("prompts", "seconds", "prompts/s", "peak MiB"), rows, title=f"uniroute fit, K={arguments.clusters}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=SIZES)
    parser.add_argument("--clusters", type=int, default=64)
    parser.add_argument("--count", action="store_true", help="also assign every prompt")
    parser.add_argument("--data-dir", type=Path, help="where an embedding table is already")
    return parser.parse_args()


def _command(arguments: argparse.Namespace, prompts: Path, out: Path) -> list[str]:
    command = [sys.executable, "-m", "proxy.cli", "fit", str(prompts), "--out", str(out)]
    command += ["--clusters", str(arguments.clusters), "--data-dir", str(arguments.data_dir or prompts.parent)]
    return [*command, "--count"] if arguments.count else command


def _cost_of(command: list[str]) -> Cost:
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with status {process.returncode}")
    return Cost(time.perf_counter() - started, usage.ru_maxrss / KIB_PER_MIB)


if __name__ == "__main__":
    main()
