"""Bytes over a socket as no HTTP client would send them, and what comes back. Understands just enough HTTP."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """`status` 0: closed without a word."""

    status: int
    headers: dict[str, str]
    body: bytes
    closed: bool
    """The server ended the connection after it."""

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> Any:
        return self.json()["error"]["code"]


def send(address: tuple[str, int], *pieces: bytes, wait_s: float = 0.3, timeout_s: float = 10.0) -> list[Answer]:
    """Every answer, in order, until the server closes or has said nothing more for `wait_s` after the first."""
    with socket.create_connection(address, timeout=timeout_s) as connection:
        with suppress(ConnectionError):
            for piece in pieces:
                connection.sendall(piece)
        raw, closed = received(connection, wait_s)
    return list(_answers(raw, closed))


def received(connection: socket.socket, wait_s: float) -> tuple[bytes, bool]:
    raw = b""
    try:
        while piece := connection.recv(65536):
            raw += piece
            connection.settimeout(wait_s)
    except TimeoutError:
        return raw, False
    except ConnectionError:
        pass
    return raw, True


def _answers(raw: bytes, closed: bool) -> Iterable[Answer]:
    while raw:
        head, _, raw = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", len(raw)))
        body, raw = raw[:length], raw[length:]
        status = int(first.split(" ")[1])
        if status >= 200:
            yield Answer(status, headers, body, closed)
