"""Install other gateways into environments of their own: LiteLLM's proxy from PyPI, Portkey from npm."""

from __future__ import annotations

import json
import shutil
import subprocess
import venv
from pathlib import Path

LITELLM = "litellm[proxy]==1.106.2"
PORTKEY, PORTKEY_VERSION = "@portkey-ai/gateway", "1.15.2"
# What Portkey answers with. It asks for ^1.3.3, but from 1.14 on a fetched answer's headers cannot be changed, which
# Portkey does with those of streams: all of them fail with 500.
HONO, HONO_VERSION = "@hono/node-server", "1.13.8"


def litellm_program(folder: Path) -> Path:
    program = folder / "litellm" / "bin" / "litellm"
    if not program.exists():
        venv.create(folder / "litellm", with_pip=True)
        pip = [str(program.with_name("python")), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, LITELLM], check=True)
    return program


def portkey_script(folder: Path) -> Path:
    home = folder / "portkey"
    if (_version(home, PORTKEY), _version(home, HONO)) != (PORTKEY_VERSION, HONO_VERSION):
        if shutil.which("npm") is None:
            raise SystemExit("Portkey runs on Node; install it, with npm, or leave --peers out")
        wanted = {"dependencies": {PORTKEY: PORTKEY_VERSION}, "overrides": {HONO: HONO_VERSION}}
        home.mkdir(parents=True, exist_ok=True)
        (home / "package-lock.json").unlink(missing_ok=True)
        (home / "package.json").write_text(json.dumps(wanted))
        subprocess.run(["npm", "install", "--silent", "--ignore-scripts"], cwd=home, check=True)
    return home / "node_modules" / PORTKEY / "build" / "start-server.js"


def _version(home: Path, package: str) -> str:
    manifest = home / "node_modules" / package / "package.json"
    return str(json.loads(manifest.read_text())["version"]) if manifest.exists() else ""


def versions(folder: Path) -> dict[str, str]:
    """Return the installed versions; LiteLLM's may be another than would be installed now."""
    found = next((folder / "litellm").glob("lib/python*/site-packages/litellm-*.dist-info"), None)
    litellm = found.name.removeprefix("litellm-").removesuffix(".dist-info") if found else "?"
    return {"LiteLLM proxy": litellm, "Portkey": _version(folder / "portkey", PORTKEY)}
