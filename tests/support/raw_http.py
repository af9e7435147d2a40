"""Send bytes over a socket that no HTTP client would send, and read the responses."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Answer:
    """Hold one answer. `status` 0: closed without an answer."""

    status: int
    headers: dict[str, str]
    body: bytes
    closed: bool = True
    """The server ended the connection after it."""

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> Any:
        return self.json()["error"]["code"]


_LAST = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nx-request-id: the-last\r\nconnection: close\r\n\r\n"


def send(
    address: tuple[str, int], *pieces: bytes, wait_s: float | None = None, timeout_s: float = 60.0
) -> list[Answer]:
    """Send the pieces and return every answer, in order.

    With `wait_s`, read until the server closes, or has sent nothing for so long. Without it, a request for /healthz
    follows once the first answer has begun; the answers before its own are returned.
    """
    with socket.create_connection(address, timeout=60) as connection:
        with suppress(ConnectionError):
            for piece in pieces:
                connection.sendall(piece)
        raw, closed = _received(connection, wait_s)
    answers = list(_answers(raw))
    return [replace(answer, closed=closed) for answer in answers if answer.headers.get("x-request-id") != "the-last"]


def _received(connection: socket.socket, wait_s: float | None) -> tuple[bytes, bool]:
    """Return what was received, and whether the server closed the connection by itself."""
    raw = b""
    with suppress(ConnectionError):
        try:
            while piece := connection.recv(65536):
                if not raw and wait_s is None:
                    connection.sendall(_LAST)
                raw += piece
                connection.settimeout(wait_s or connection.gettimeout())
        except TimeoutError:
            return raw, False
    return raw, b"x-request-id: the-last" not in raw


def _answers(raw: bytes) -> Iterator[Answer]:
    while raw:
        head, _, raw = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", len(raw)))
        body, raw = raw[:length], raw[length:]
        status = int(first.split(" ")[1])
        if status >= 200:
            yield Answer(status, headers, body)
