"""A proxy with two models behind client keys, which are created over HTTP as an administrator creates them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
import openai

from proxy.settings.schema import Settings
from proxy.storage.client_keys import AuthRequiredLatch
from proxy.storage.redis import Store
from proxy.storage.registry import Registry
from tests.support.proxy_process import ProxyProcess
from tests.support.waiting import until_taken, wait_until

T = TypeVar("T")
ASK: Any = [{"role": "user", "content": "What is 2 + 2?"}]


def with_registry(data_dir: Path, work: Callable[[Registry], Awaitable[T]]) -> T:
    """Do some work on the embedded store of a data directory, whether a server uses it or not."""

    async def run() -> T:
        store = await Store.open(Settings(data_dir=data_dir))
        try:
            return await work(Registry(store, (), AuthRequiredLatch(data_dir)))
        finally:
            await store.close()

    return asyncio.run(run())


@dataclass(frozen=True)
class MadeKey:
    id: str
    secret: str

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.secret}"}


@dataclass(frozen=True)
class KeyedProxy:
    """As a context manager it closes every client that it opened."""

    proxy: ProxyProcess
    opened: list[openai.OpenAI] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self.opened:
            client.close()

    def make(self, **terms: Any) -> MadeKey:
        reply = until_taken(lambda: self.proxy.admin("POST", "/admin/keys", {"name": "team", **terms}))
        return MadeKey(reply.json()["id"], reply.json()["key"])

    def client(self, key: MadeKey) -> openai.OpenAI:
        client = openai.OpenAI(base_url=f"{self.proxy.url}/v1", api_key=key.secret, max_retries=0, timeout=60)
        self.opened.append(client)
        return client

    def call(self, key: MadeKey | None, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        sent = {**(key.headers if key else {}), **headers}
        return httpx.request(method, self.proxy.url + path, json=body, headers=sent, timeout=60)

    def opens(self, key: MadeKey | None) -> bool:
        return self.call(key, "GET", "/v1/models").status_code == 200

    def audit_lines(self, request_id: str) -> list[dict[str, str]]:
        """Those of the log, once they are there: the line follows the response."""
        whole_line = re.compile(rf"^.*uniroute\.audit.* request={re.escape(request_id)}\n", re.MULTILINE)
        assert wait_until(lambda: whole_line.search(self.proxy.log))
        return [dict(re.findall(r"(\w+)=(\S+)", line)) for line in whole_line.findall(self.proxy.log)]

    def trail(self, limit: int = 50) -> list[dict[str, Any]]:
        """Newest first."""
        entries: list[dict[str, Any]] = self.proxy.admin("GET", f"/admin/audit?limit={limit}").json()["entries"]
        return entries

    def seen_anywhere(self, secret: str) -> list[str]:
        """Where a secret can be read after its creation."""
        pages = {
            path: self.proxy.admin("GET", path).text
            for path in ("/admin/keys", "/admin/audit?limit=1000", "/admin/models", "/metrics", "/v1/models")
        }
        pages["log"] = self.proxy.log
        return [where for where, text in pages.items() if secret in text or json.dumps(secret)[1:-1] in text]
