"""Record which functions of `proxy` and `router_core` one chat request enters.

The app is served in this process, on uvicorn with its own protocol, in front of a scripted model on loopback and a real
Valkey. `sys.setprofile` notes each function that is entered between the first byte of the request and the last of the
answer. Tasks that ran before the request (the snapshot's, the journals') are left out, and so is the client's.
"""

from __future__ import annotations

import ast
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
import yaml

from proxy.app import from_environment
from proxy.server.protocol import LimitedHTTPProtocol
from tests.support.proxy_process import ADMIN_KEY, model_entry, uniform_profile
from tests.support.scripted_upstream import ScriptedUpstream

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("proxy", "router_core")
# Requests of each kind before the one that is noted: what is made once is made then.
WARM_UP = 3
LIMITS = {"requests_per_minute": 1000, "tokens_per_minute": 10**6, "usd_per_day": 100.0}
SERVED_S = 60.0


@dataclass(frozen=True, order=True)
class Function:
    file: str
    """Below the root of the repository."""
    name: str
    line: int


class Walk:
    """Record the functions that one thread enters, in order and with returns."""

    def __init__(self) -> None:
        self.entered: list[Function] = []
        self._others: frozenset[asyncio.Task[Any]] = frozenset()

    @property
    def files(self) -> list[str]:
        return sorted({function.file for function in self.entered})

    @property
    def functions(self) -> list[Function]:
        return sorted(set(self.entered))

    @contextmanager
    def noted(self) -> Iterator[None]:
        self._others = frozenset(asyncio.all_tasks())
        sys.setprofile(self._note)
        try:
            yield
        finally:
            sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        if event != "call":
            return
        code = frame.f_code
        file = _ours(code.co_filename)
        if file is not None and asyncio.current_task() not in self._others:
            self.entered.append(Function(file, code.co_qualname, code.co_firstlineno))


@cache
def _ours(filename: str) -> str | None:
    path = Path(filename)
    below = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
    return below if below.split("/", 1)[0] in PACKAGES else None


@dataclass(frozen=True)
class Served:
    port: int

    async def call(self, method: str, path: str, body: Mapping[str, Any], key: str | None) -> tuple[int, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        raw = json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", f"host: 127.0.0.1:{self.port}", "content-type: application/json"]
        lines += [
            f"content-length: {len(raw)}",
            "connection: close",
            *([f"authorization: Bearer {key}"] if key else []),
        ]
        writer.write("\r\n".join((*lines, "", "")).encode() + raw)
        head, _, content = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()
        return int(head.split(b" ", 2)[1]), content

    async def admin(self, method: str, path: str, body: Mapping[str, Any]) -> Any:
        status, answer = await self.call(method, path, body, ADMIN_KEY)
        while status == 503:  # the store was late, on a busy machine
            status, answer = await self.call(method, path, body, ADMIN_KEY)
        if status >= 300:
            raise RuntimeError(f"{method} {path} answered {status}: {answer[:500]!r}")
        return json.loads(answer)


@asynccontextmanager
async def served(folder: Path, upstream_url: str) -> AsyncIterator[Served]:
    """Serve an app with two measured models, of which "auto" chooses "fair"."""
    config = {
        "model_list": [model_entry("fair", upstream_url, price=1e-7), model_entry("good", upstream_url, price=1e-5)],
        "uniroute": {"profile": {"on_start": False}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    named = {"UNIROUTE_CONFIG": str(folder / "config.yaml"), "UNIROUTE_DATA_DIR": str(folder)}
    app = from_environment({**named, "UNIROUTE_ADMIN_KEY": ADMIN_KEY, "MODEL_API_KEY": "sk-x"})
    server = uvicorn.Server(
        uvicorn.Config(
            app, port=0, http=LimitedHTTPProtocol, loop="asyncio", ws="none", log_config=None, proxy_headers=False
        )
    )
    serving = asyncio.create_task(server._serve())
    try:
        async with asyncio.timeout(SERVED_S):
            while not server.started:  # noqa: ASYNC110  uvicorn has no event for it
                await asyncio.sleep(0.01)
            proxy = Served(server.servers[0].sockets[0].getsockname()[1])
            while (await proxy.call("GET", "/readyz", {}, None))[0] != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        for name, error in (("fair", 0.3), ("good", 0.1)):
            await proxy.admin("POST", f"/admin/models/{name}/profile", uniform_profile(error))
        yield proxy
    finally:
        server.should_exit = True
        await serving


async def walks(folder: Path) -> dict[str, Walk]:
    """Record one request of each kind."""
    found: dict[str, Walk] = {}
    with ScriptedUpstream() as upstream:
        async with served(folder, upstream.url) as proxy:
            kinds = {"named model": ("fair", False), "routed": ("auto", False), "routed stream": ("auto", True)}
            for kind, (model, stream) in kinds.items():
                found[kind] = await _walk(proxy, model, stream=stream, key=None)
            made = await proxy.admin("POST", "/admin/keys", {"name": "limited", **LIMITS})
            found["routed stream, limited key"] = await _walk(proxy, "auto", stream=True, key=made["key"])
    return found


async def _walk(proxy: Served, model: str, *, stream: bool, key: str | None) -> Walk:
    walk = Walk()
    for number in range(WARM_UP + 1):
        # no prompt comes twice: its clusters would be known
        messages = [{"role": "user", "content": f"What is {number} + {time.monotonic_ns()}? Answer in one word."}]
        body = {"model": model, "messages": messages, "stream": stream}
        if number < WARM_UP:
            status, answer = await proxy.call("POST", "/v1/chat/completions", body, key)
        else:
            with walk.noted():
                status, answer = await proxy.call("POST", "/v1/chat/completions", body, key)
        if status != 200:
            raise RuntimeError(f"the request for {model} was answered {status}: {answer[:500]!r}")
    return walk


def weightless(functions: list[Function]) -> list[Function]:
    """Return the functions that only call one other function with their own arguments, or only return an attribute."""
    return [function for function in functions if _is_weightless(function)]


def _is_weightless(function: Function) -> bool:
    defined = _definitions(function.file).get(function.line)
    return defined is not None and only_passes_on(defined)


@cache
def _definitions(file: str) -> dict[int, ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {min([node.lineno, *(each.lineno for each in node.decorator_list)]): node for node in found}


def only_passes_on(defined: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Tell whether the body is one call of a named function on names and constants, or one attribute."""
    body = [each for each in defined.body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
    if defined.name.startswith("__") or len(body) != 1:
        return False
    only = body[0]
    value = only.value if isinstance(only, ast.Return | ast.Expr) else None
    value = value.value if isinstance(value, ast.Await) else value
    if isinstance(value, ast.Call):
        return all(map(_is_plain, (value.func, *value.args, *(keyword.value for keyword in value.keywords))))
    return isinstance(value, ast.Attribute) and _is_plain(value)


def _is_plain(node: ast.expr) -> bool:
    if isinstance(node, ast.Attribute):
        return _is_plain(node.value)
    return isinstance(node, ast.Name | ast.Constant)
