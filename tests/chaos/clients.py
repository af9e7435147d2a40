from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import httpx
import openai

from tests.chaos.other_apis import MESSAGES, RESPONSES, OtherAPI, chat_events
from tests.chaos.outcomes import (
    DROPPED,
    HUNG,
    LEFT,
    Verdict,
    judge_body,
    judge_events,
    judge_part,
    judge_refusal,
    judge_text,
)
from tests.chaos.questions import Json, Question

# Longer than any request may take by the run's settings: who waits longer hangs.
TIMEOUT_S = 60.0
STALL_S = (1.0, 3.0)
# Of an answer that does not fit into the buffers between a model and a client that does not read.
LONG_WORDS = 60_000


@dataclass(frozen=True)
class Ask:
    """Hold one request, ready to be sent."""

    question: Question
    model: str
    key: str
    headers: Mapping[str, str]
    extra: Json
    rng: Random

    def sdk(self, pool: ClientPool) -> Any:
        return pool.sdk.with_options(api_key=self.key).chat.completions.with_raw_response

    @property
    def all_headers(self) -> Mapping[str, str]:
        return {**self.headers, "authorization": f"Bearer {self.key}"}

    def body(self, *, stream: bool) -> Json:
        messages = [{"role": "user", "content": self.question.prompt}]
        options = {"stream_options": {"include_usage": True}} if stream and self.rng.random() < 0.5 else {}
        return {"model": self.model, "messages": messages, "stream": stream, **options, **self.extra}


@dataclass(frozen=True)
class ClientResponse:
    verdict: Verdict
    status: int | None = None
    decision: str | None = None


@dataclass(frozen=True)
class ClientPool:
    """Hold the HTTP clients of one server."""

    http: httpx.AsyncClient
    narrow: httpx.AsyncClient
    """Its sockets hold little that is not read."""
    sdk: openai.AsyncOpenAI

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str) -> AsyncIterator[ClientPool]:
        little = [(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)]
        async with AsyncExitStack() as closing:
            yield cls(
                await closing.enter_async_context(_client(url)),
                await closing.enter_async_context(
                    _client(url, transport=httpx.AsyncHTTPTransport(socket_options=little))
                ),
                await closing.enter_async_context(
                    openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S)
                ),
            )


def _client(url: str, **more: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, trust_env=False, **more)


Client = Callable[[ClientPool, Ask], Awaitable[ClientResponse]]


async def plain(pool: ClientPool, ask: Ask) -> ClientResponse:
    reply = await pool.http.post("/v1/chat/completions", json=ask.body(stream=False), headers=ask.all_headers)
    if reply.is_error:
        return _refused(reply)
    return _response(reply, judge_body(ask.question, _json(reply.content)))


async def streamed(pool: ClientPool, ask: Ask) -> ClientResponse:
    async with _stream(pool.http, ask) as reply:
        if reply.is_error:
            await reply.aread()
            return _refused(reply)
        return _response(reply, judge_events(ask.question, [event async for event in _events(reply)]))


async def sdk_plain(pool: ClientPool, ask: Ask) -> ClientResponse:
    raw = await ask.sdk(pool).create(**_for_sdk(ask, stream=False))
    return _response(raw.http_response, judge_body(ask.question, raw.parse().model_dump()))


async def sdk_streamed(pool: ClientPool, ask: Ask) -> ClientResponse:
    """Stream with the SDK. It hides [DONE]: a stream that ends without an error is, to its user, complete."""
    raw = await ask.sdk(pool).create(**_for_sdk(ask, stream=True))
    text, model = "", None
    try:
        async for chunk in raw.parse():
            model = chunk.model
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
    except openai.APIError as error:
        if isinstance(error, openai.APIConnectionError):
            raise
        event = b"data: " + json.dumps({"error": error.body}).encode()
        verdict = judge_part(ask.question, text)
        return _response(raw.http_response, judge_events(ask.question, [event]) if verdict.ending == LEFT else verdict)
    return _response(raw.http_response, judge_text(ask.question, text, model, ended=True))


def of_other_api(api: OtherAPI, *, stream: bool) -> Client:
    """Return a client of another API than chat."""

    async def client(pool: ClientPool, ask: Ask) -> ClientResponse:
        body = {"model": ask.model, "stream": stream, **api.body(ask.question), **ask.extra}
        async with pool.http.stream("POST", api.path, json=body, headers=ask.all_headers) as reply:
            if reply.is_error:
                failure = api.error(_json(await reply.aread()))
                return _response(reply, judge_refusal(_usual_status(reply), reply.headers, failure))
            if stream:
                return _response(
                    reply, judge_events(ask.question, chat_events(api, [event async for event in _events(reply)]))
                )
            return _response(reply, judge_body(ask.question, api.completion(_json(await reply.aread()))))

    return client


def _usual_status(reply: httpx.Response) -> int:
    """Return 503 for Anthropic's own status of an overloaded server."""
    return 503 if reply.status_code == 529 else reply.status_code


async def leaving_early(pool: ClientPool, ask: Ask) -> ClientResponse:
    """Disconnect, usually before the first byte."""
    work = asyncio.create_task(ask.rng.choice((plain, streamed))(pool, ask))
    done, _ = await asyncio.wait({work}, timeout=ask.rng.uniform(0.0, 0.05))
    if done:
        return work.result()
    work.cancel()
    await asyncio.wait({work})
    return ClientResponse(Verdict(LEFT)) if work.cancelled() else work.result()


async def leaving_midway(pool: ClientPool, ask: Ask) -> ClientResponse:
    stays = ask.rng.randint(1, 4)
    events = []
    async with _stream(pool.http, ask) as reply:
        if reply.is_error:
            await reply.aread()
            return _refused(reply)
        async for event in _events(reply):
            events.append(event)
            if len(events) == stays:
                return _response(reply, judge_part(ask.question, text_of(events)))
        return _response(reply, judge_events(ask.question, events))


async def stalling(pool: ClientPool, ask: Ask) -> ClientResponse:
    """Read a little of a long answer, pause for a while, then read all of it."""
    events = []
    async with _stream(pool.narrow, ask) as reply:
        if reply.is_error:
            await reply.aread()
            return _refused(reply)
        async for event in _events(reply):
            events.append(event)
            if len(events) == 2:
                await asyncio.sleep(ask.rng.uniform(*STALL_S))
        return _response(reply, judge_events(ask.question, events))


# With their weights.
CLIENTS: Mapping[str, tuple[float, Client]] = {
    "plain": (16, plain),
    "streamed": (16, streamed),
    "Messages plain": (4, of_other_api(MESSAGES, stream=False)),
    "Messages streamed": (8, of_other_api(MESSAGES, stream=True)),
    "Responses plain": (4, of_other_api(RESPONSES, stream=False)),
    "Responses streamed": (8, of_other_api(RESPONSES, stream=True)),
    "SDK plain": (16, sdk_plain),
    "SDK streamed": (16, sdk_streamed),
    "leaves early": (8, leaving_early),
    "leaves midway": (8, leaving_midway),
    "stalls": (1, stalling),
}


async def send_request(client: Client, pool: ClientPool, ask: Ask) -> ClientResponse:
    """Send a request and return its outcome, also where the connection is lost."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await client(pool, ask)
    except openai.APIStatusError as error:
        return _refused(error.response)
    except (TimeoutError, httpx.TimeoutException, openai.APITimeoutError) as error:
        return ClientResponse(Verdict(HUNG, f"nothing more within {TIMEOUT_S:g} s ({type(error).__name__})"))
    except (httpx.TransportError, openai.APIConnectionError) as error:
        return ClientResponse(Verdict(DROPPED, f"{type(error).__name__}: {error}"))


def text_of(events: list[bytes]) -> str:
    """Join the content of the chunks among the events."""
    text = ""
    for event in events:
        payload = _json(event.removeprefix(b"data: "))
        for choice in payload.get("choices") or () if isinstance(payload, dict) else ():
            text += choice["delta"].get("content") or ""
    return text


def _for_sdk(ask: Ask, *, stream: bool) -> Json:
    body = ask.body(stream=stream)
    own = {"uniroute": body.pop("uniroute")} if "uniroute" in body else {}
    return {**body, "extra_headers": dict(ask.headers), "extra_body": own}


def _stream(client: httpx.AsyncClient, ask: Ask) -> Any:
    return client.stream("POST", "/v1/chat/completions", json=ask.body(stream=True), headers=ask.all_headers)


async def _events(reply: httpx.Response) -> AsyncIterator[bytes]:
    """Yield each event without its blank line, and what follows the last blank line."""
    rest = b""
    async for piece in reply.aiter_bytes():
        *whole, rest = (rest + piece).split(b"\n\n")
        for event in whole:
            yield event
    if rest:
        yield rest


def _refused(reply: httpx.Response) -> ClientResponse:
    return _response(reply, judge_refusal(reply.status_code, reply.headers, _json(reply.content)))


def _response(reply: httpx.Response, verdict: Verdict) -> ClientResponse:
    return ClientResponse(verdict, reply.status_code, reply.headers.get("x-uniroute-decision"))


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw
