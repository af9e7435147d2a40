"""Calls to a running server, for commands. What the answers mean is left to them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal

import httpx

from proxy.cli.console import BadArgument, CommandError, Progress
from proxy.outbound import WayOutError, http_client

_POLL_S = 0.3
Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
FINISHED = frozenset({"ready", "failed", "cancelled"})


class ServerClient:
    """One server. Every failure becomes a CommandError with the server's own words."""

    def __init__(self, url: str, key: str | None) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.url = url.rstrip("/")
        try:
            self._http = http_client(base_url=self.url, headers=headers, timeout=60)
        except (httpx.InvalidURL, ValueError) as error:
            raise BadArgument(f"--url: {url!r} is not an address, as http://127.0.0.1:8000 ({error})") from None

    def call(self, method: Method, path: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            reply = self._http.request(method, path, json=body)
        except WayOutError as error:
            raise CommandError(f"the server at {self.url} cannot be reached: {error}") from None
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise CommandError(
                f"no UniRoute server answers at {self.url} ({error}); start one with `uniroute serve`, or give --url"
            ) from None
        if reply.is_success:
            return reply.json() if reply.content else None
        raise CommandError(f"{method} {path}: {reply.status_code} {_message(reply)}")

    def follow(self, job: str, progress: Progress) -> dict[str, Any]:
        """Show a job's progress until it has ended; returns its last state."""
        while (state := self.show_job(job, progress))["state"] not in FINISHED:
            time.sleep(_POLL_S)
        return state

    def show_job(self, job: str, progress: Progress) -> dict[str, Any]:
        state: dict[str, Any] = self.call("GET", f"/admin/jobs/{job}")
        progress.update(state["model"], state["done"], state["total"], _remark(state))
        return state

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> ServerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _remark(state: Mapping[str, Any]) -> str:
    parts = [f"${state['spent_usd']:.4f}"] if state["spent_usd"] else []
    parts += [f"{state[key]} {key}" for key in ("failed", "unlabelled") if state[key]]
    if state["eta_s"] is not None and state["state"] == "running":
        parts.append(f"{state['eta_s']:.0f} s left")
    return ", ".join(parts)


def _message(reply: httpx.Response) -> str:
    try:
        return str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return reply.text[:200]
