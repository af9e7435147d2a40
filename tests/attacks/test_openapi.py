"""Check the OpenAPI document: it has every route, and requests made from it get the responses that it names."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from fastapi.routing import APIRoute

from proxy.app import ROUTERS, Application
from proxy.server.startup import Startup
from proxy.settings.schema import Settings
from tests.attacks.conftest import ADMIN
from tests.support.command import ADMIN_KEY, ServeCommand, environment, run_command
from tests.support.proxy_process import model_entry, uniform_profile
from tests.support.scripted_upstream import ScriptedUpstream

CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance"),
    *("response_schema_conformance", "negative_data_rejection", "missing_required_header", "unsupported_method"),
    *("allow_header_conformance", "ignored_auth"),
)


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[ServeCommand]:
    """Start a server with a client key, so that every endpoint needs one."""
    folder = tmp_path_factory.mktemp("described")
    environ = environment(folder / "data", embedder_cache, UNIROUTE_ADMIN_KEY=ADMIN_KEY, MODEL_API_KEY="sk-x")
    with ScriptedUpstream() as upstream:
        config = {"model_list": [model_entry("fair", upstream.url)], "uniroute": {"profile": {"on_start": False}}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        assert run_command("keys", "create", "somebody", environ=environ).returncode == 0
        with ServeCommand("--config", folder / "config.yaml", environ=environ, log=folder / "log.txt") as server:
            url = f"{server.url}/admin/models/fair/profile"
            assert httpx.post(url, json=uniform_profile(0.1), headers=ADMIN).status_code == 200
            yield server


def document() -> dict[str, Any]:
    return Application(Settings(), Startup()).openapi()


def routes() -> set[tuple[str, str]]:
    found = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    return {(method.lower(), route.path_format) for route in found for method in route.methods or ()}


def test_the_document_describes_every_route_and_no_other() -> None:
    described = {(method, path) for path, methods in document()["paths"].items() for method in methods}

    assert described == routes()


def test_errors_are_answered_with_the_statuses_and_the_shape_of_this_server_alone() -> None:
    whole = document()
    operations = [operation for path in whole["paths"].values() for operation in path.values()]
    keyed = [operation for operation in operations if "security" in operation]
    schemas = whole["components"]["schemas"]

    assert len(operations) - len(keyed) == 3
    assert all({"400", "401", "403", "503"} <= operation["responses"].keys() for operation in keyed)
    assert not {"HTTPValidationError", "ValidationError"} & schemas.keys()
    assert schemas["Error"]["required"] == ["error"]
    assert schemas["NewModel"]["required"] == ["model_name", "litellm_params"]


def test_the_document_needs_a_client_key(described: ServeCommand) -> None:
    assert httpx.get(f"{described.url}/openapi.json").status_code == 401
    assert httpx.get(f"{described.url}/openapi.json", headers=ADMIN).json() == document()
    for path in ("/docs", "/redoc", "/docs/oauth2-redirect"):
        assert httpx.get(described.url + path, headers=ADMIN).status_code == 404


# What is generated may pause the only model: then the 503 that the document has is right.
CONFIGURATION = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503]
"""


def schemathesis(server: ServeCommand, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    (folder / "schemathesis.toml").write_text(CONFIGURATION)
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
    command += ["--header", f"Authorization: Bearer {ADMIN_KEY}", "--checks", ",".join(CHECKS), "--no-color"]
    command += ["--request-timeout", "120", "--seed", "1", "--generation-database", "none", *more]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=570, check=False)


def test_generated_requests_are_answered_as_the_document_says(described: ServeCommand, tmp_path: Path) -> None:
    ended = schemathesis(described, tmp_path, "--phases", "examples,coverage,fuzzing", "--max-examples", "10")

    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
    assert "Traceback" not in described.log


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_more_generated_requests_are(described: ServeCommand, tmp_path: Path) -> None:
    ended = schemathesis(described, tmp_path, "--max-examples", "200", "--max-time", "240")

    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
