from __future__ import annotations

import pytest

from proxy.app import ROUTERS
from proxy.server.middleware import ServedPaths, corrected_path, unknown_path_message


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/admin/models", {"GET", "HEAD", "POST"}),
        ("/admin/models/team/new", {"GET", "HEAD", "PATCH", "DELETE"}),
        ("/admin/models/team/new/pricing", {"PUT"}),
        ("/v1/chat/completions", {"POST"}),
        ("/v1/models/team/new", {"GET", "HEAD"}),
        ("/v1/responses/input_tokens", {"POST"}),
        ("/nothing", set()),
    ],
)
def test_the_methods_of_a_path_are_those_of_all_its_routes(path: str, methods: set[str]) -> None:
    assert ServedPaths(ROUTERS).methods(path) == methods


@pytest.mark.parametrize(
    ("path", "corrected"),
    [
        ("//v1/chat//completions/", "/v1/chat/completions"),
        ("/chat/completions", "/v1/chat/completions"),
        ("/models/fair/", "/v1/models/fair"),
        ("/v1/models/fair", None),
        ("/healthz/", "/healthz"),
        ("//admin/keys", None),
        ("/responses", "/v1/responses"),
        ("/responses/resp_1", "/v1/responses/resp_1"),
        ("/v1/v1/messages", "/v1/messages"),
        ("/v1/v1/messages/count_tokens", "/v1/messages/count_tokens"),
        ("/responses/input_tokens/", "/v1/responses/input_tokens"),
        ("/v1/files", None),
    ],
)
def test_only_slashes_and_a_missing_or_second_v1_are_corrected_and_never_on_admin_paths(
    path: str, corrected: str | None
) -> None:
    assert corrected_path(path) == corrected


def test_an_unknown_path_is_told_of_the_closest_one_and_cut() -> None:
    message = unknown_path_message("GET", "/v1/model")

    assert "did you mean /v1/models?" in message
    assert len(unknown_path_message("X" * 1000, "/" + "y" * 10_000)) < 600
