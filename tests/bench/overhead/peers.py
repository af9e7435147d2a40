"""Gateways of others, installed into environments of their own: LiteLLM's proxy from PyPI, Portkey from npm."""

from __future__ import annotations

import json
import shutil
import subprocess
import venv
from pathlib import Path

LITELLM = "litellm[proxy]==1.106.2"
PORTKEY = "@portkey-ai/gateway@1.15.2"


def litellm_program(folder: Path) -> Path:
    program = folder / "litellm" / "bin" / "litellm"
    if not program.exists():
        venv.create(folder / "litellm", with_pip=True)
        pip = [str(program.with_name("python")), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, LITELLM], check=True)
    return program


def portkey_script(folder: Path) -> Path:
    script = folder / "portkey" / "node_modules/@portkey-ai/gateway/build/start-server.js"
    if not script.exists():
        if shutil.which("npm") is None:
            raise SystemExit("Portkey runs on Node; install it, with npm, or leave --peers out")
        subprocess.run(["npm", "install", "--silent", "--prefix", str(folder / "portkey"), PORTKEY], check=True)
    return script


def versions(folder: Path) -> dict[str, str]:
    """As installed, which may be another than would be installed now."""
    package = folder / "portkey/node_modules/@portkey-ai/gateway/package.json"
    found = next((folder / "litellm").glob("lib/python*/site-packages/litellm-*.dist-info"), None)
    litellm = found.name.removeprefix("litellm-").removesuffix(".dist-info") if found else "?"
    return {"LiteLLM proxy": litellm, "Portkey": str(json.loads(package.read_text())["version"])}
