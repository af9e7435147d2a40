from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import redis
import yaml

from proxy.storage.client_keys import AuthRequiredLatch
from proxy.storage.redis import Store
from proxy.storage.registry import Registry
from proxy.storage.usage_writer import TOTALS
from proxy.storage.valkey import socket_path
from tests.support.command import ADMIN_KEY, ServeCommand, environment
from tests.support.proxy_process import model_entry, uniform_profile
from tests.support.scripted_upstream import ScriptedUpstream

CONFIGURED = "configured"
TRANSLATED = "translated"
QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]
PRICE = {"input_cost_per_token": 2e-6, "output_cost_per_token": 8e-6}


@dataclass
class Gateway:
    """Hold a gateway. `server` runs while the block lasts; a test may end it and open another on the same folder."""

    folder: Path
    server: ServeCommand
    upstream: ScriptedUpstream
    client_key: str | None = None

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def data_dir(self) -> Path:
        return self.folder / "data"

    def admin(self, method: str, path: str, body: Any = None) -> httpx.Response:
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        return httpx.request(method, f"{self.url}/admin{path}", json=body, headers=headers, timeout=60)

    def add(self, name: str) -> httpx.Response:
        return self.admin("POST", "/models", {**model_entry(name, self.upstream.url), "profile": uniform_profile(0.1)})

    def put_price(self, name: str = CONFIGURED, usd: float = 2e-6) -> httpx.Response:
        price = {"input_cost_per_token": usd, "output_cost_per_token": 4 * usd}
        return self.admin("PUT", f"/models/{name}/pricing", price)

    def ask(self, model: str = "auto") -> httpx.Response:
        body = {"model": model, "messages": QUESTION}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=self.headers, timeout=60)

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.client_key}"} if self.client_key else {}

    @contextmanager
    def streaming(self, model: str = CONFIGURED) -> Iterator[httpx.Response]:
        body = {"model": model, "messages": QUESTION, "stream": True}
        url = f"{self.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, headers=self.headers, timeout=60) as answer:
            yield answer

    def ready(self) -> dict[str, Any]:
        document: dict[str, Any] = httpx.get(f"{self.url}/readyz", timeout=60).json()
        return document

    @property
    def embedded_url(self) -> str:
        return f"unix://{socket_path(self.data_dir / 'valkey')}"

    def embedded_store(self) -> redis.Redis:
        return redis.Redis.from_url(self.embedded_url, decode_responses=True)

    def create_client_key(self, store_url: str) -> str:
        """Return the secret of a new key, made in the store past this server, which then asks every client for one."""
        return asyncio.run(_create_key(store_url, AuthRequiredLatch(self.data_dir)))


async def _create_key(store_url: str, latch: AuthRequiredLatch) -> str:
    store = Store(store_url)
    _, secret = await Registry(store, (), latch).keys.create("a client")
    await store.close()
    return secret


def embedded_pid(gateway: Gateway) -> int:
    with gateway.embedded_store() as client:
        info: Any = client.info("server")
    return int(info["process_id"])


def counted(client: redis.Redis) -> int:
    """Count the requests in the totals of all models."""
    keys: Any = client.keys(f"{TOTALS}:*")
    stored: Any = [client.hget(key, "requests") for key in keys]
    return sum(int(count) for count in stored)


def journalled(data_dir: Path) -> list[dict[str, Any]]:
    """Return every record in the journals, whether Redis has it or not."""
    files = sorted((data_dir / "usage").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@contextmanager
def a_gateway(
    folder: Path,
    embedder_cache: Path,
    upstream: ScriptedUpstream,
    *arguments: str,
    environ: Mapping[str, str] | None = None,
    translated: bool = False,
    **section: Any,
) -> Iterator[Gateway]:
    """Run `uniroute serve` with its data in `folder`. `section`: settings of the configuration file.

    `translated`: with a second model, without a profile, that is called through litellm.
    """
    entries = [model_entry(CONFIGURED, upstream.url)]
    entries += [model_entry(TRANSLATED, upstream.url, forward="translate")] if translated else []
    section = {"profile": {"on_start": False}, **section}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model_list": entries, "uniroute": section}))
    names = {"UNIROUTE_ADMIN_KEY": ADMIN_KEY, "MODEL_API_KEY": "sk-arm", **(environ or {})}
    whole = environment(folder / "data", embedder_cache, **names)
    server = ServeCommand(
        "--config",
        folder / "config.yaml",
        *arguments,
        environ=whole,
        log=folder / "log.txt",
        translates=translated,
    )
    with server:
        gateway = Gateway(folder, server, upstream)
        reply = gateway.admin("POST", f"/models/{CONFIGURED}/profile", uniform_profile(0.2))
        assert reply.status_code in (200, 503), reply.text
        yield gateway
