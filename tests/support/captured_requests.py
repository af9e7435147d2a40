"""Requests that clients have sent, with their texts replaced and all but a few of their tools left out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.client_apis import API_NAMES, PATHS, APIName

_FOLDER = Path(__file__).parent.parent / "server/api/captured"


@dataclass(frozen=True)
class CapturedRequest:
    client: str
    path: str
    """With its query."""
    headers: list[tuple[str, str]]
    """As they were sent, but for the key."""
    body: dict[str, Any]

    @property
    def api(self) -> APIName:
        return next(api for api in API_NAMES if PATHS[api] == self.path.partition("?")[0])


def read_captured(name: str) -> CapturedRequest:
    document = json.loads((_FOLDER / f"{name}.json").read_bytes())
    headers = [(name, value) for name, value in document["headers"]]
    return CapturedRequest(document["client"], document["path"], headers, document["body"])


def captured_body(name: str) -> dict[str, Any]:
    return read_captured(name).body


NAMES = sorted(path.stem for path in _FOLDER.glob("*.json"))


def names_of(api: APIName) -> list[str]:
    return [name for name in NAMES if read_captured(name).api == api]
