from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from proxy.errors import UpstreamError
from proxy.storage.records import ModelRecord
from proxy.upstream.client import UpstreamClient
from tests.support.chunk_streams import PulledBlocks
from tests.support.direct_calls import BODY, KEY, completion_of, error_of, model_in_mode, stream_of
from tests.support.raw_upstream import CHUNK, DONE, END, JSON, RawUpstream, Reply, chunked, plain

pytestmark = pytest.mark.parametrize("mode", ["relay", "translate"])

EVENTS = CHUNK + END + DONE
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
ERROR = b'{"object": "error", "message": "boom", "code": 503}'


def data(chunk: Any) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def choice(index: int = 0, delta: Any = None, reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {"index": index, "delta": delta or {}, "finish_reason": reason, **more}


def chunk(*choices: dict[str, Any], **more: Any) -> bytes:
    return data({"id": "c", "model": "theirs", "choices": list(choices), **more})


def text_of(found: list[bytes], index: int = 0) -> str:
    choices = [each for event in found for each in json.loads(event)["choices"] if each["index"] == index]
    return "".join(each["delta"].get("content") or "" for each in choices)


def bare(body: bytes, *lines: bytes) -> Reply:
    return plain(body, head=b"".join(line + b"\r\n" for line in lines))


AS_CALLED = [
    (),
    (b"content-type: text/plain; charset=utf-8",),
    (b"content-type: application/json",),
    (b"content-type: Text/Event-Stream",),
    (b"content-type: text/event-stream", b"content-encoding: none"),
    (b"content-type: text/event-stream", b"content-encoding: br"),
    (b"content-encoding: gzip",),
]


@pytest.mark.parametrize("lines", AS_CALLED)
async def test_events_and_json_are_told_apart_whatever_the_content_type(
    upstream: UpstreamClient, mode: str, lines: tuple[bytes, ...]
) -> None:
    async with RawUpstream(
        bare(EVENTS, *lines), bare(JSON, *lines), bare(EVENTS, *lines), bare(JSON, *lines)
    ) as server:
        record = model_in_mode(server, mode)
        assert [text_of(await stream_of(upstream, record)) for _ in range(2)] == ["hi", "hi"]
        answers = [json.loads(await completion_of(upstream, record)) for _ in range(2)]
    assert [answer["choices"][0]["message"]["content"] for answer in answers] == ["hi", "hi"]


@pytest.mark.parametrize("lines", [(), (b"content-encoding: GZIP",), (b"content-encoding: none",)])
async def test_a_body_that_starts_compressed_is_decompressed(
    upstream: UpstreamClient, mode: str, lines: tuple[bytes, ...]
) -> None:
    async with RawUpstream(bare(gzip.compress(EVENTS), *lines), bare(gzip.compress(JSON), *lines)) as server:
        record = model_in_mode(server, mode)
        assert text_of(await stream_of(upstream, record)) == "hi"
        assert b"hi" in await completion_of(upstream, record)


ENDED = chunk(choice(0, {"content": "hi"}), choice(1, {"content": "ho"})) + chunk(
    choice(0, {}, "stop"), choice(1, {}, "length"), usage=USAGE
)


@pytest.mark.parametrize("then", ["close", "reset"])
@pytest.mark.parametrize("ends", [CHUNK + END, CHUNK + END + b"data: {half", CHUNK + DONE, ENDED])
async def test_a_finished_answer_is_complete_however_its_connection_ends(
    upstream: UpstreamClient, mode: str, ends: bytes, then: Any
) -> None:
    async with RawUpstream(Reply(chunked(ends, end=b""), then)) as server:
        record = model_in_mode(server, mode)
        assert text_of(await stream_of(upstream, record)) == "hi"
        assert b'"hi"' in await completion_of(upstream, record)


@pytest.mark.parametrize(
    "body",
    [
        chunk(choice(0, {"content": "a"}), choice(1, {"content": "b"})) + chunk(choice(0, {}, "stop")),
        CHUNK,
        chunk(choice(0, {"content": "a"}, "")),
    ],
)
async def test_a_choice_that_never_finishes_is_an_error(upstream: UpstreamClient, mode: str, body: bytes) -> None:
    async with RawUpstream(Reply(chunked(body)), Reply(chunked(body, end=b""), "close")) as server:
        record = model_in_mode(server, mode)
        for _ in range(2):
            await error_of(upstream, record, stream_of)
        await error_of(upstream, record, completion_of)


async def test_a_requested_choice_that_never_started_is_an_error(upstream: UpstreamClient, mode: str) -> None:
    async def two(upstream: UpstreamClient, record: ModelRecord) -> None:
        async for _ in PulledBlocks(await upstream.stream(record, {**BODY, "n": 2, "stream": True})):
            pass

    async with RawUpstream(Reply(chunked(CHUNK, END, end=b""), "close"), Reply(chunked(CHUNK, END))) as server:
        await error_of(upstream, model_in_mode(server, mode), two)
        await two(upstream, model_in_mode(server, mode))  # a server that knows no `n`


@pytest.mark.parametrize(
    "error",
    [
        b"data: " + ERROR + b"\n\n",
        b"event: error\ndata: " + ERROR + b"\n\n",
        b'event: error\ndata: {"message": "boom", "code": 503}\n\n',
        b'error: {"message": "boom", "code": 503}\n\n',
        b'{"error": {"message": "boom", "code": 503}}\n\n',
        b'{\n "error": {\n  "message": "boom", "code": 503}\n}\n\n',
        b'data: {"error": {"message": "boom", "code": "503"}}\r\n\r\n',
        chunk({**choice(), "error": {"message": "boom", "code": 503}}),
        chunk(choice(0, {"content": ""}, "error"), error={"message": "boom", "code": 503}),
    ],
)
@pytest.mark.parametrize("before", [b"", CHUNK, CHUNK + END])
async def test_an_error_within_a_stream_ends_it_whatever_follows(
    upstream: UpstreamClient, mode: str, before: bytes, error: bytes
) -> None:
    async with RawUpstream(Reply(chunked(before + error, END, DONE))) as server:
        for ask in (stream_of, completion_of):
            failure = await error_of(upstream, model_in_mode(server, mode), ask)
            assert (failure.status, "boom" in json.dumps(failure.body)) == (503, True)


async def test_retry_after_of_an_error_within_a_success_is_kept(upstream: UpstreamClient, mode: str) -> None:
    body = b'{"error": {"message": "slow down", "code": 429}}'
    async with RawUpstream(
        bare(body, b"retry-after: 7"), bare(b"data: " + body + b"\n\n", b"retry-after: 7")
    ) as server:
        for _ in range(2):
            failure = await error_of(upstream, model_in_mode(server, mode), stream_of)
            assert (failure.status, failure.headers["retry-after"]) == (429, "7")


WHOLE: dict[str, Any] = {
    "id": "chatcmpl-9",
    "object": "chat.completion",
    "created": 7,
    "model": "ours",
    "system_fingerprint": "fp",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "two words",
                "refusal": "no more",
                "reasoning_text": "well then",
                "audio": {"id": "audio_1", "data": "AAAA", "transcript": "hm", "expires_at": 9},
                "tool_calls": [
                    {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"a":1}'}},
                    {"id": "call_2", "type": "function", "function": {"name": "find", "arguments": "{}"}},
                ],
            },
            "logprobs": {"content": [{"token": "two", "logprob": -0.5}], "refusal": None},
            "finish_reason": "tool_calls",
        },
        {"index": 1, "message": {"role": "assistant", "content": "other"}, "logprobs": None, "finish_reason": "length"},
    ],
    "usage": USAGE,
}


async def test_a_completion_in_place_of_a_stream_becomes_equal_chunks(upstream: UpstreamClient, mode: str) -> None:
    async with RawUpstream(plain(json.dumps({**WHOLE, "model": "theirs"}, indent=1).encode())) as server:
        found = await stream_of(upstream, model_in_mode(server, mode))
    events = [json.loads(event) for event in found]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert (events[-1]["choices"], events[-1]["usage"]) == ([], USAGE)

    async with RawUpstream(Reply(chunked(*map(data, events), DONE))) as server:
        again = json.loads(await completion_of(upstream, model_in_mode(server, mode)))
    again["choices"][0]["logprobs"]["refusal"] = None  # null says nothing
    assert again == WHOLE


async def test_a_stream_in_place_of_a_completion_becomes_one(upstream: UpstreamClient, mode: str) -> None:
    pieces = [
        chunk(choice(0, {"role": "assistant", "content": ""}), id="c1"),
        chunk(choice(0, {"tool_calls": [call(0, id="call_1", name="find")]})),
        chunk(choice(0, {"tool_calls": [call(1, id="call_2", name="look", arguments="{")]})),
        chunk(choice(0, {"tool_calls": [call(0, arguments='{"a"'), call(1, arguments="}")]})),
        chunk(choice(0, {"tool_calls": [call(0, name="find", arguments=":1}")]})),
        chunk(choice(0, {"tool_calls": [call(0, id="call_3", name="same", arguments="{}")]})),
        chunk(choice(1, {"reasoning": "h", "content": "o"})),
        chunk(choice(1, {"reasoning": "m", "content": "k"}, "stop")),
        chunk(choice(0, {}, "tool_calls", usage=USAGE)),
    ]
    async with RawUpstream(Reply(chunked(*pieces))) as server:
        answer = json.loads(await completion_of(upstream, model_in_mode(server, mode)))

    first, second = answer["choices"]
    calls = [
        (each["id"], each["function"]["name"], each["function"]["arguments"]) for each in first["message"]["tool_calls"]
    ]
    assert calls == [("call_1", "find", '{"a":1}'), ("call_2", "look", "{}"), ("call_3", "same", "{}")]
    assert second["message"] == {"role": "assistant", "content": "ok", "reasoning": "hm"}
    assert (answer["id"], answer["usage"], second["finish_reason"]) == ("c1", USAGE, "stop")


def call(index: int, **fields: str) -> dict[str, Any]:
    function = {name: fields[name] for name in ("name", "arguments") if name in fields}
    return {
        "index": index,
        **({"id": fields["id"], "type": "function"} if "id" in fields else {}),
        "function": function,
    }


async def test_tool_calls_without_an_index_are_told_apart_by_their_ids(upstream: UpstreamClient, mode: str) -> None:
    calls = [{**call(0, id=f"call_{name}", name=name, arguments="{"), "index": None} for name in "ab"]
    more = {"function": {"arguments": "}"}}
    pieces = [chunk(choice(0, {"tool_calls": [each]})) + chunk(choice(0, {"tool_calls": [more]})) for each in calls]
    async with RawUpstream(Reply(chunked(*pieces, END))) as server:
        message = json.loads(await completion_of(upstream, model_in_mode(server, mode)))["choices"][0]["message"]
    assert [each["function"] for each in message["tool_calls"]] == [{"name": each, "arguments": "{}"} for each in "ab"]


async def test_usage_inside_a_choice_becomes_the_completions(upstream: UpstreamClient, mode: str) -> None:
    last = chunk(choice(0, {}, "stop", usage=USAGE))
    body = {"choices": [{"index": 0, "message": {"content": "hi"}, "finish_reason": "stop", "usage": USAGE}]}
    async with RawUpstream(Reply(chunked(CHUNK, last)), plain(json.dumps(body).encode())) as server:
        found = await stream_of(upstream, model_in_mode(server, mode))
        answer = json.loads(await completion_of(upstream, model_in_mode(server, mode)))
    assert json.loads(found[-1])["usage"] == answer["usage"] == USAGE


@pytest.mark.parametrize(
    "body", [b"<html>no</html>", b"nonsense", b'{"id": null, "choices": null}', b"[]", b'{"choices"']
)
async def test_a_body_that_is_neither_events_nor_a_completion_is_an_error(
    upstream: UpstreamClient, mode: str, body: bytes
) -> None:
    async with RawUpstream(plain(body)) as server:
        for ask in (stream_of, completion_of):
            assert (await error_of(upstream, model_in_mode(server, mode), ask)).status in (502, None)


async def test_events_of_careless_servers_are_read(upstream: UpstreamClient, mode: str) -> None:
    odd = [
        b"event: ping\ndata: ping\n\n: comment\n\ndata: : PROCESSING\n\n" + CHUNK + END,
        (CHUNK + END + DONE).replace(b"\n\n", b"\n"),
        (CHUNK + END + DONE).replace(b"\n", b"\r"),
        CHUNK[6:] + END[6:],
    ]
    for body in odd:
        async with RawUpstream(Reply(chunked(body))) as server:
            assert text_of(await stream_of(upstream, model_in_mode(server, mode))) == "hi"


async def test_a_response_with_too_many_choices_is_rejected(upstream: UpstreamClient, mode: str) -> None:
    many = b"".join(chunk(choice(index, {"content": "x"})) for index in range(1100))
    async with RawUpstream(Reply(chunked(many))) as server:
        assert "choices" in (await error_of(upstream, model_in_mode(server, mode), stream_of)).message


async def test_a_key_in_an_error_within_a_stream_is_redacted(upstream: UpstreamClient, mode: str) -> None:
    async with RawUpstream(Reply(chunked(CHUNK, b'data: {"error": "key ' + KEY.encode() + b'"}\n\n'))) as server:
        failure: UpstreamError = await error_of(upstream, model_in_mode(server, mode), stream_of)
    assert "***" in json.dumps(failure.body)
