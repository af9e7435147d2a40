from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import anthropic
import openai
import pytest

from proxy.errors import ResponseTooLarge, UpstreamError
from proxy.routing.fingerprints import TextSample, TurnFingerprints
from proxy.settings.model_config import NativeAPI
from proxy.settings.schema import Settings
from proxy.storage.records import ModelRecord
from proxy.storage.usage import TokenCounts, parse_usage, usage_of
from proxy.upstream.chunk_reader import is_finished
from proxy.upstream.client import NativeRequest, UpstreamClient
from proxy.upstream.payload import NativePayload, content_bytes, finish_reasons, has_content, is_empty_completion
from tests.support.chunk_streams import PulledBlocks
from tests.support.direct_calls import KEY, a_model
from tests.support.makers import a_record
from tests.support.native_answers import (
    CALL_EVENTS,
    CALL_ID,
    ENCRYPTED,
    MESSAGE,
    MESSAGE_DELTA,
    MESSAGE_EVENTS,
    MESSAGE_START,
    OPENAI_CALL_ID,
    RESPONSE,
    RESPONSE_EVENTS,
    RESPONSE_OUTPUT,
    SIGNATURE,
    TEXT_EVENTS,
    THINKING_EVENTS,
    a_response,
    event,
)
from tests.support.raw_upstream import STREAM_HEAD, RawUpstream, Reply, chunked, plain
from tests.support.waiting import until

APIS: tuple[NativeAPI, ...] = ("messages", "responses")
DOCUMENTS: dict[NativeAPI, dict[str, Any]] = {
    "messages": {"model": "auto", "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]},
    "responses": {"model": "auto", "input": "hi"},
}
ASKED = {api: NativeRequest(api, document) for api, document in DOCUMENTS.items()}
TRACED = {"traceparent": "00-1-2-01"}
STREAMS: dict[NativeAPI, tuple[bytes, ...]] = {"messages": MESSAGE_EVENTS, "responses": RESPONSE_EVENTS}
ANSWERS: dict[NativeAPI, dict[str, Any]] = {"messages": MESSAGE, "responses": RESPONSE}
QUESTION = TextSample("hi")


@pytest.fixture
async def upstream() -> AsyncIterator[UpstreamClient]:
    opened = UpstreamClient(Settings(), {"MODEL_API_KEY": KEY})
    yield opened
    await opened.aclose()


def native_model(server: RawUpstream, **params: Any) -> ModelRecord:
    return replace(a_model(server, **params), info=a_record("ours", info={"api": list(APIS)}).info)


async def read(upstream: UpstreamClient, record: ModelRecord, api: NativeAPI) -> list[NativePayload]:
    found: list[NativePayload] = []
    await read_into(found, upstream, record, api)
    return found


async def read_into(found: list[NativePayload], upstream: UpstreamClient, record: ModelRecord, api: NativeAPI) -> None:
    async with asyncio.timeout(60):
        stream: Any = PulledBlocks(await upstream.stream_native(record, NativeRequest(api, DOCUMENTS[api])))
        try:
            async for block in stream:
                found += block
        finally:
            await stream.aclose()


async def ask(upstream: UpstreamClient, record: ModelRecord, api: NativeAPI, *, streamed: bool) -> None:
    if streamed:
        await read(upstream, record, api)
    else:
        await upstream.complete_native(record, NativeRequest(api, DOCUMENTS[api]))


async def failure_of(
    upstream: UpstreamClient, reply: Reply, api: NativeAPI
) -> tuple[UpstreamError, list[NativePayload]]:
    found: list[NativePayload] = []
    async with RawUpstream(reply) as server:
        with pytest.raises(UpstreamError) as caught:
            await read_into(found, upstream, native_model(server), api)
    return caught.value, found


def relayed(events: Sequence[NativePayload]) -> bytes:
    return b"".join(each.with_model("ours") for each in events)


def renamed(api: NativeAPI, events: Sequence[bytes]) -> bytes:
    """Rename the model of the answer, and nothing else that is called so."""
    if api == "messages":
        return b"".join((events[0].replace(b'"theirs"', b'"ours"'), *events[1:]))
    whole = b'"model": "theirs", "output"'
    return b"".join(events).replace(whole, whole.replace(b"theirs", b"ours"))


@pytest.mark.parametrize("api", APIS)
async def test_the_events_come_back_as_they_are_but_for_the_models_name(
    upstream: UpstreamClient, api: NativeAPI
) -> None:
    async with RawUpstream(Reply(chunked(*STREAMS[api]))) as server:
        found = await read(upstream, native_model(server), api)

    assert relayed(found) == renamed(api, STREAMS[api])
    assert len(found) == len(STREAMS[api])


@pytest.mark.parametrize("api", APIS)
async def test_a_whole_answer_comes_back_as_it_is_but_for_the_models_name(
    upstream: UpstreamClient, api: NativeAPI
) -> None:
    sent = json.dumps(ANSWERS[api], indent=1).encode()
    async with RawUpstream(plain(sent)) as server:
        answer = await upstream.complete_native(native_model(server), NativeRequest(api, DOCUMENTS[api]))

    place = sent.rfind(b'"theirs"') if api == "responses" else sent.find(b'"theirs"')
    assert answer.with_model("ours") == sent[:place] + b'"ours"' + sent[place + 8 :]
    assert answer.native == ANSWERS[api]


@pytest.mark.parametrize("api", APIS)
async def test_the_models_own_name_is_sent_and_whether_it_is_a_stream(upstream: UpstreamClient, api: NativeAPI) -> None:
    async with RawUpstream(Reply(chunked(*STREAMS[api])), plain(json.dumps(ANSWERS[api]).encode())) as server:
        await read(upstream, native_model(server), api)
        await upstream.complete_native(
            native_model(server), NativeRequest(api, DOCUMENTS[api], {"traceparent": "00-1-2-01"})
        )

    sent = [json.loads(body) for body in server.bodies]
    assert [(each["model"], each["stream"]) for each in sent] == [("theirs", True), ("theirs", False)]
    assert b"traceparent: 00-1-2-01\r\n" in server.heads[1]


async def test_usage_of_messages_counts_the_cache_as_part_of_the_prompt(upstream: UpstreamClient) -> None:
    async with RawUpstream(Reply(chunked(*MESSAGE_EVENTS)), plain(json.dumps(MESSAGE).encode())) as server:
        events = await read(upstream, native_model(server), "messages")
        answer = await upstream.complete_native(native_model(server), ASKED["messages"])

    reports = [parse_usage(usage) for each in events if (usage := usage_of(each.body))]
    prompt = TokenCounts(prompt_tokens=2310, cached_tokens=2000, written_tokens=300, written_1h_tokens=200)
    whole = replace(prompt, output_tokens=40, reasoning_tokens=15)
    assert reports == [prompt, whole]
    assert parse_usage(usage_of(answer.body)) == whole


async def test_usage_of_responses_is_read(upstream: UpstreamClient) -> None:
    async with RawUpstream(Reply(chunked(*RESPONSE_EVENTS)), plain(json.dumps(RESPONSE).encode())) as server:
        events = await read(upstream, native_model(server), "responses")
        answer = await upstream.complete_native(
            native_model(server), NativeRequest("responses", DOCUMENTS["responses"])
        )

    whole = TokenCounts(prompt_tokens=100, cached_tokens=60, written_tokens=0, output_tokens=30, reasoning_tokens=12)
    assert [parse_usage(usage) for each in events if (usage := usage_of(each.body))] == [whole]
    assert parse_usage(usage_of(answer.body)) == whole


async def test_counts_that_come_late_or_as_zero_are_completed(upstream: UpstreamClient) -> None:
    start = {"type": "message_start", "message": {"model": "x", "usage": {"input_tokens": 0, "output_tokens": 0}}}
    end = {
        "type": "message_delta",
        "delta": {"stop_reason": "end_turn"},
        "usage": {"input_tokens": 7, "output_tokens": 2},
    }
    sent = chunked(event(start), *TEXT_EVENTS, event(end), event({"type": "message_stop"}))
    async with RawUpstream(Reply(sent)) as server:
        events = await read(upstream, native_model(server), "messages")

    counts = [parse_usage(usage) for each in events if (usage := usage_of(each.body))]
    assert counts == [TokenCounts(prompt_tokens=7, output_tokens=2)]


@pytest.mark.parametrize(
    ("api", "first"), [("messages", b"thinking_delta"), ("responses", b"response.reasoning_summary_text.delta")]
)
async def test_the_first_content_is_what_the_model_wrote_first(
    upstream: UpstreamClient, api: NativeAPI, first: bytes
) -> None:
    async with RawUpstream(Reply(chunked(*STREAMS[api]))) as server:
        events = await read(upstream, native_model(server), api)

    assert first in next(each for each in events if has_content(each.body)).with_model("ours")


@pytest.mark.parametrize("api", APIS)
async def test_a_stream_says_as_much_as_the_whole_answer(upstream: UpstreamClient, api: NativeAPI) -> None:
    async with RawUpstream(Reply(chunked(*STREAMS[api])), plain(json.dumps(ANSWERS[api]).encode())) as server:
        events = await read(upstream, native_model(server), api)
        answer = await upstream.complete_native(native_model(server), NativeRequest(api, DOCUMENTS[api]))

    (last,) = [each for each in events if is_finished(each.body)]
    assert finish_reasons(last.body) == finish_reasons(answer.body) == {"tool_calls"}
    # the name of a call is not written again for each of its arguments
    assert sum(content_bytes(each.body) for each in events) >= content_bytes(answer.body) - len('{"command": "ls"}')
    assert not is_empty_completion(answer.body)


@pytest.mark.parametrize(
    ("stop_reason", "expected"),
    [
        ("end_turn", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("refusal", "content_filter"),
        ("pause_turn", "stop"),
        (["odd"], "stop"),
    ],
)
async def test_every_reason_to_stop_has_one_in_chat(upstream: UpstreamClient, stop_reason: Any, expected: str) -> None:
    answer = {**MESSAGE, "content": [], "stop_reason": stop_reason}
    async with RawUpstream(plain(json.dumps(answer).encode())) as server:
        found = await upstream.complete_native(native_model(server), ASKED["messages"])

    assert finish_reasons(found.body) == {expected}
    assert is_empty_completion(found.body) is (expected == "stop")


@pytest.mark.parametrize(
    ("reason", "expected"), [("max_output_tokens", "length"), ("content_filter", "content_filter"), (None, "length")]
)
async def test_an_incomplete_response_says_why(upstream: UpstreamClient, reason: str | None, expected: str) -> None:
    details = None if reason is None else {"reason": reason}
    response = a_response("incomplete", output=[], incomplete_details=details)
    end = event({"type": "response.incomplete", "response": response})
    async with RawUpstream(Reply(chunked(RESPONSE_EVENTS[0], end))) as server:
        events = await read(upstream, native_model(server), "responses")

    assert finish_reasons(events[-1].body) == {expected}


def fingerprints(*messages: Any) -> tuple[list[str], list[str]]:
    turn = TurnFingerprints()
    for message in messages:
        turn.add(message)
    return list(turn.of_reasoning(QUESTION)), list(turn.of_calls(QUESTION))


TRANSLATED: dict[NativeAPI, dict[str, Any]] = {
    "messages": {
        "role": "assistant",
        "thinking_blocks": [{"type": "thinking", "thinking": "Let me see.", "signature": SIGNATURE}],
        "tool_calls": [{"id": CALL_ID, "type": "function", "function": {"name": "run", "arguments": "{}"}}],
    },
    "responses": {
        "role": "assistant",
        "reasoning_details": [{"type": "reasoning.encrypted", "data": ENCRYPTED}],
        "tool_calls": [{"id": OPENAI_CALL_ID, "type": "function", "function": {"name": "run", "arguments": "{}"}}],
    },
}


@pytest.mark.parametrize("api", APIS)
async def test_a_turn_that_comes_back_in_chat_is_recognised(upstream: UpstreamClient, api: NativeAPI) -> None:
    async with RawUpstream(Reply(chunked(*STREAMS[api])), plain(json.dumps(ANSWERS[api]).encode())) as server:
        events = await read(upstream, native_model(server), api)
        answer = await upstream.complete_native(native_model(server), NativeRequest(api, DOCUMENTS[api]))

    (signature, *_), calls = fingerprints(TRANSLATED[api])
    deltas = [choice["delta"] for each in events for choice in each.body["choices"]]
    for reasoning, found_calls in (fingerprints(*deltas), fingerprints(answer.body["choices"][0]["message"])):
        assert (reasoning[0], found_calls) == (signature, calls)


async def test_anthropics_sdk_reads_what_is_relayed(upstream: UpstreamClient) -> None:
    async with RawUpstream(Reply(chunked(*MESSAGE_EVENTS)), plain(json.dumps(MESSAGE).encode())) as server:
        events = relayed(await read(upstream, native_model(server), "messages"))
        answer = await upstream.complete_native(native_model(server), ASKED["messages"])
    whole = anthropic.types.Message.model_validate_json(answer.with_model("ours"))
    async with (
        RawUpstream(Reply(chunked(events))) as server,
        anthropic.AsyncAnthropic(api_key="x", base_url=server.url.removesuffix("/v1")) as client,
        client.messages.stream(model="ours", max_tokens=9, messages=[{"role": "user", "content": "hi"}]) as stream,
    ):
        streamed = await stream.get_final_message()

    assert streamed.model == whole.model == "ours"
    assert [block.type for block in streamed.content] == [block.type for block in whole.content]


async def test_openais_sdk_reads_what_is_relayed(upstream: UpstreamClient) -> None:
    async with RawUpstream(Reply(chunked(*RESPONSE_EVENTS)), plain(json.dumps(RESPONSE).encode())) as server:
        events = relayed(await read(upstream, native_model(server), "responses"))
        answer = await upstream.complete_native(
            native_model(server), NativeRequest("responses", DOCUMENTS["responses"])
        )
    whole = openai.types.responses.Response.model_validate_json(answer.with_model("ours"))
    async with (
        RawUpstream(Reply(chunked(events))) as server,
        openai.AsyncOpenAI(api_key="x", base_url=server.url) as client,
        client.responses.stream(model="ours", input="hi") as stream,
    ):
        streamed = await stream.get_final_response()

    assert streamed.model == whole.model == "ours"
    assert streamed.output_text == whole.output_text == "Looking ü"


@pytest.mark.parametrize("api", APIS)
async def test_the_connection_is_used_again_though_reading_ends_with_the_answer(
    upstream: UpstreamClient, api: NativeAPI
) -> None:
    late = chunked(*STREAMS[api], b": comment\n\n", b"data: [DONE]\n\n", event({"type": "ping"}))
    async with RawUpstream(Reply(late)) as server:
        for _ in range(3):
            assert relayed(await read(upstream, native_model(server), api)) == renamed(api, STREAMS[api])
            await until(lambda: not upstream._pool._draining)

    assert (server.connections, len(server.bodies)) == (1, 3)


ENDS = ("keep", "close", "reset")


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("then", ENDS)
async def test_a_stream_without_its_end_is_an_error(
    upstream: UpstreamClient, api: NativeAPI, then: Literal["keep", "close", "reset"]
) -> None:
    sent = chunked(*STREAMS[api][:-1], end=b"0\r\n\r\n" if then == "keep" else b"")
    failure, found = await failure_of(upstream, Reply(sent, then), api)

    ends_early = "the model's stream ended before its answer did"
    assert failure.message.startswith(ends_early if then == "keep" else "the model's stream broke")
    assert (len(found), failure.retryable, failure.connection_lost) == (len(STREAMS[api]) - 1, True, False)


@pytest.mark.parametrize("api", APIS)
async def test_what_comes_after_the_end_of_an_answer_may_break(upstream: UpstreamClient, api: NativeAPI) -> None:
    async with RawUpstream(Reply(chunked(*STREAMS[api], end=b""), "reset")) as server:
        assert len(await read(upstream, native_model(server), api)) == len(STREAMS[api])


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("overloaded_error", 503),
        ("rate_limit_error", 429),
        ("api_error", 502),
        ("timeout_error", 504),
        ("authentication_error", 401),
        ("invalid_request_error", 400),
    ],
)
async def test_an_error_among_the_events_of_messages_has_a_status(
    upstream: UpstreamClient, kind: str, status: int
) -> None:
    error = {"type": "error", "error": {"type": kind, "message": "Not now"}}
    failure, found = await failure_of(upstream, Reply(chunked(MESSAGE_EVENTS[0], event(error))), "messages")

    assert (failure.status, failure.body, len(found)) == (status, error, 1)


@pytest.mark.parametrize(
    ("payload", "status", "message"),
    [
        ({"type": "error", "code": "rate_limit_exceeded", "message": "Slow down", "param": None}, 429, "Slow down"),
        ({"type": "error", "error": {"type": "server_error", "message": "Sorry"}}, 502, "Sorry"),
        ({"error": {"message": "odd"}}, 502, "odd"),
        (
            {
                "type": "response.failed",
                "response": a_response("failed", error={"code": "server_error", "message": "Broken"}),
            },
            502,
            "Broken",
        ),
        (
            {
                "type": "response.failed",
                "response": a_response("failed", error={"code": "context_length_exceeded", "message": "Too much"}),
            },
            400,
            "Too much",
        ),
    ],
)
async def test_an_error_among_the_events_of_responses_has_a_status(
    upstream: UpstreamClient, payload: dict[str, Any], status: int, message: str
) -> None:
    failing = event(payload, str(payload.get("type", "message")))
    failure, found = await failure_of(upstream, Reply(chunked(RESPONSE_EVENTS[0], failing)), "responses")

    assert (failure.status, len(found)) == (status, 1)
    assert message in json.dumps(failure.body)


async def test_a_failed_response_keeps_its_usage_which_is_billed(upstream: UpstreamClient) -> None:
    failed = a_response("failed", error={"code": "server_error", "message": "Broken"})
    sent = event({"type": "response.failed", "response": failed})
    streamed, _ = await failure_of(upstream, Reply(chunked(sent)), "responses")
    async with RawUpstream(plain(json.dumps(failed).encode())) as server:
        with pytest.raises(UpstreamError) as whole:
            await upstream.complete_native(native_model(server), ASKED["responses"])

    for failure in (streamed, whole.value):
        assert parse_usage(usage_of(cast("dict[str, Any]", failure.body))).output_tokens == 30


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("status", [400, 401, 429, 500, 529])
async def test_a_refusal_passes_on_with_its_status_and_body(
    upstream: UpstreamClient, api: NativeAPI, status: int
) -> None:
    body = b'{"type": "error", "error": {"type": "odd_error", "message": "No. %s"}}' % KEY.encode()
    for streamed in (False, True):
        async with RawUpstream(plain(body, b"retry-after: 3\r\n", b"%d No" % status)) as server:
            with pytest.raises(UpstreamError) as caught:
                await ask(upstream, native_model(server), api, streamed=streamed)
        failure = caught.value
        assert (failure.status, failure.body) == (status, body.replace(KEY.encode(), b"***"))
        assert (failure.headers, failure.retryable) == ({"retry-after": "3"}, status in (429, 500, 529))


async def test_a_prompt_that_is_too_long_for_claude_is_told_from_other_errors(upstream: UpstreamClient) -> None:
    words = "prompt is too long: 210000 tokens > 200000 maximum"
    body = json.dumps({"type": "error", "error": {"type": "invalid_request_error", "message": words}}).encode()
    failure, _ = await failure_of(upstream, plain(body, status=b"400 Bad"), "messages")

    assert (failure.context_exceeded, failure.retryable) == (True, True)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (b"event: x\ndata: {nonsense\n\n", "not JSON"),
        (b"event: x\ndata: 7\n\n", "not a JSON object"),
        (b"event: error\ndata: overloaded\n\n", "reported an error"),
        (b'{"error": {"message": "alone"}}\n', "reported an error"),
    ],
)
async def test_what_is_no_event_is_an_error_after_those_before(
    upstream: UpstreamClient, api: NativeAPI, piece: bytes, message: str
) -> None:
    failure, found = await failure_of(upstream, Reply(chunked(STREAMS[api][0], piece)), api)

    assert message in failure.message
    assert len(found) == 1


@pytest.mark.parametrize("api", APIS)
async def test_events_where_a_whole_answer_was_asked_for_become_that_answer(
    upstream: UpstreamClient, api: NativeAPI
) -> None:
    async with RawUpstream(Reply(chunked(*STREAMS[api]))) as server:
        answer = await upstream.complete_native(native_model(server), ASKED[api])

    assert json.loads(answer.with_model("ours")) == {**ANSWERS[api], "model": "ours"}
    assert parse_usage(usage_of(answer.body)) is not None


async def test_a_response_whose_last_event_leaves_out_the_output_has_it_from_its_items(
    upstream: UpstreamClient,
) -> None:
    end = event({"type": "response.completed", "response": a_response(output=[])})
    async with RawUpstream(Reply(chunked(*RESPONSE_EVENTS[:-1], end))) as server:
        answer = await upstream.complete_native(native_model(server), ASKED["responses"])

    assert answer.native["output"] == RESPONSE_OUTPUT
    assert finish_reasons(answer.body) == {"tool_calls"}


@pytest.mark.parametrize("api", APIS)
async def test_events_that_end_before_the_whole_answer_did_are_an_error(
    upstream: UpstreamClient, api: NativeAPI
) -> None:
    async with RawUpstream(Reply(chunked(*STREAMS[api][:-1]))) as server:
        with pytest.raises(UpstreamError, match="ended before its answer did") as caught:
            await upstream.complete_native(native_model(server), ASKED[api])

    assert caught.value.retryable


async def test_the_input_of_a_call_that_is_not_json_is_an_error(upstream: UpstreamClient) -> None:
    sent = b"".join(MESSAGE_EVENTS).replace(b'\\"ls\\"}', b'\\"ls\\"')
    async with RawUpstream(Reply(chunked(sent))) as server:
        with pytest.raises(UpstreamError, match="input of a tool call that is not JSON"):
            await upstream.complete_native(native_model(server), ASKED["messages"])


@pytest.mark.parametrize("api", APIS)
async def test_an_error_among_events_in_place_of_a_whole_answer_is_that_error(
    upstream: UpstreamClient, api: NativeAPI
) -> None:
    failed = event({"type": "error", "error": {"type": "overloaded_error", "message": "full"}})
    async with RawUpstream(Reply(chunked(STREAMS[api][0], failed))) as server:
        with pytest.raises(UpstreamError, match="reported an error"):
            await upstream.complete_native(native_model(server), ASKED[api])


CITED: dict[str, Any] = {
    **MESSAGE,
    "stop_reason": "stop_sequence",
    "stop_sequence": "END",
    "content": [
        {"type": "redacted_thinking", "data": "b3BhcXVl"},
        {"type": "text", "text": "", "citations": None},
        {
            "type": "text",
            "text": "It is so.",
            "citations": [
                {
                    "type": "char_location",
                    "cited_text": "so",
                    "document_index": 0,
                    "document_title": None,
                    "file_id": None,
                    "start_char_index": 0,
                    "end_char_index": 2,
                }
            ],
        },
        {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "ü"}},
        {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []},
        {"type": "tool_use", "id": CALL_ID, "name": "run", "input": {}},
    ],
}
URL: dict[str, Any] = {"type": "url_citation", "url": "https://x", "title": "x", "start_index": 0, "end_index": 1}
SEARCHED = a_response(
    "incomplete",
    incomplete_details={"reason": "max_output_tokens"},
    output=[
        {
            "id": "rs_1",
            "type": "reasoning",
            "summary": [{"type": "summary_text", "text": "One."}, {"type": "summary_text", "text": "Two."}],
            "status": "completed",
        },
        {"id": "ws_1", "type": "web_search_call", "status": "completed", "action": {"type": "search", "query": "x"}},
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "status": "incomplete",
            "content": [
                {"type": "output_text", "text": "It is", "annotations": [URL], "logprobs": []},
                {"type": "refusal", "refusal": "No more."},
            ],
        },
        {"id": "ct_1", "type": "custom_tool_call", "call_id": "call_1", "name": "shell", "input": "ls"},
        {
            "id": "fc_1",
            "type": "function_call",
            "call_id": "call_2",
            "name": "f",
            "arguments": "",
            "status": "completed",
        },
    ],
)
WHOLE_ANSWERS: list[tuple[NativeAPI, dict[str, Any]]] = [
    ("messages", MESSAGE),
    ("messages", CITED),
    ("messages", {**MESSAGE, "content": [], "stop_reason": "end_turn"}),
    ("responses", RESPONSE),
    ("responses", SEARCHED),
    ("responses", a_response(output=[])),
]


async def events_instead(upstream: UpstreamClient, api: NativeAPI, answer: dict[str, Any]) -> list[NativePayload]:
    """Return what becomes of a whole answer where a stream was asked for."""
    async with RawUpstream(plain(json.dumps(answer, indent=1).encode())) as server:
        return await read(upstream, native_model(server), api)


@pytest.mark.parametrize(("api", "answer"), WHOLE_ANSWERS)
async def test_the_official_clients_read_the_whole_answer_from_the_events_that_are_made_of_it(
    upstream: UpstreamClient, api: NativeAPI, answer: dict[str, Any]
) -> None:
    events = relayed(await events_instead(upstream, api, answer))
    streamed: Any
    async with RawUpstream(Reply(chunked(events))) as server:
        if api == "messages":
            async with (
                anthropic.AsyncAnthropic(api_key="x", base_url=server.url.removesuffix("/v1")) as claude,
                claude.messages.stream(model="x", max_tokens=9, messages=[{"role": "user", "content": "hi"}]) as stream,
            ):
                streamed = await stream.get_final_message()
        else:
            async with (
                openai.AsyncOpenAI(api_key="x", base_url=server.url) as gpt,
                gpt.responses.stream(model="x", input="hi") as opened,
            ):
                streamed = None
                async for each in opened:
                    if each.type in ("response.completed", "response.incomplete"):
                        streamed = each.response

    shown = json.loads(streamed.model_dump_json(exclude_unset=True, warnings=False))
    assert without_additions(shown) == {**answer, "model": "ours"}


def without_additions(shown: Any) -> Any:
    """Leave out what the clients add to what they read."""
    if isinstance(shown, list):
        return [without_additions(each) for each in shown]
    if not isinstance(shown, dict):
        return shown
    added = ("parsed", "parsed_arguments", "stop_details")
    return {name: without_additions(value) for name, value in shown.items() if name not in added}


@pytest.mark.parametrize(("api", "answer"), WHOLE_ANSWERS)
async def test_the_events_of_a_whole_answer_say_what_it_says(
    upstream: UpstreamClient, api: NativeAPI, answer: dict[str, Any]
) -> None:
    events = await events_instead(upstream, api, answer)
    async with RawUpstream(plain(json.dumps(answer).encode())) as server:
        whole = await upstream.complete_native(native_model(server), NativeRequest(api, DOCUMENTS[api]))

    (last,) = [each for each in events if is_finished(each.body)]
    usages = [usage for each in events if (usage := usage_of(each.body))]
    assert finish_reasons(last.body) == finish_reasons(whole.body)
    assert usages[-1] == usage_of(whole.body)
    assert sum(content_bytes(each.body) for each in events) == content_bytes(whole.body)
    assert any(has_content(each.body) for each in events) == has_content(whole.body)


@pytest.mark.parametrize(("api", "answer"), WHOLE_ANSWERS)
async def test_the_answer_put_together_from_the_events_of_one_is_that_answer(
    upstream: UpstreamClient, api: NativeAPI, answer: dict[str, Any]
) -> None:
    events = relayed(await events_instead(upstream, api, {**answer, "serial": 10**30}))
    pieces = [events[place : place + 7] for place in range(0, len(events), 7)]
    async with RawUpstream(Reply(chunked(*pieces))) as server:
        whole = await upstream.complete_native(native_model(server), ASKED[api])

    assert json.loads(whole.with_model("ours")) == {**answer, "model": "ours", "serial": 10**30}


@pytest.mark.parametrize(
    ("api", "answer", "status"),
    [
        ("messages", RESPONSE, 502),
        ("responses", MESSAGE, 502),
        ("responses", a_response("failed", error={"code": "rate_limit_exceeded", "message": "slow down"}), 429),
        ("responses", a_response("queued"), 502),
        ("messages", {"type": "error", "error": {"type": "overloaded_error", "message": "no"}}, 503),
    ],
)
async def test_json_that_is_no_answer_in_place_of_events_is_an_error(
    upstream: UpstreamClient, api: NativeAPI, answer: dict[str, Any], status: int
) -> None:
    failure, found = await failure_of(upstream, plain(json.dumps(answer).encode()), api)

    assert (failure.status, failure.retryable, found) == (status, True, [])


@pytest.mark.parametrize("api", APIS)
async def test_numbers_beyond_64_bits_in_a_whole_answer_stay_as_they_are(
    upstream: UpstreamClient, api: NativeAPI
) -> None:
    events = await events_instead(upstream, api, {**ANSWERS[api], "serial": 10**30})

    assert str(10**30).encode() in relayed(events)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"error": {"message": "boom"}}',
        b'{"type": "error", "error": {"type": "api_error", "message": "boom"}}',
        b'{"id": "x", "model": "x", "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}}]}',
        b'{"content": 7, "output": 7, "status": []}',
        b"\xff\xfe{}",
        b"[" * 100_000,
    ],
)
async def test_a_success_without_an_answer_is_an_error(upstream: UpstreamClient, api: NativeAPI, body: bytes) -> None:
    for streamed in (False, True):
        async with RawUpstream(plain(body)) as server:
            with pytest.raises(UpstreamError) as caught:
                await ask(upstream, native_model(server), api, streamed=streamed)
        assert caught.value.retryable


@pytest.mark.parametrize("api", APIS)
async def test_answers_and_events_have_a_limit(api: NativeAPI) -> None:
    settings = Settings(max_answer_bytes=1_000_000, max_answers_in_flight_bytes=2_000_000)
    upstream = UpstreamClient(settings, {"MODEL_API_KEY": KEY})
    large = b'{"x": "%s"}' % (b"y" * 3_000_000)
    replies = (Reply(chunked(STREAMS[api][0], b"event: x\ndata: " + large + b"\n\n")), plain(large))
    try:
        async with RawUpstream(*replies) as server:
            with pytest.raises(ResponseTooLarge):
                await read(upstream, native_model(server), api)
            with pytest.raises(ResponseTooLarge):
                await upstream.complete_native(native_model(server), NativeRequest(api, DOCUMENTS[api]))
        assert upstream.memory.used_bytes == 0
    finally:
        await upstream.aclose()


async def test_the_memory_of_large_events_is_held_as_long_as_they_exist(upstream: UpstreamClient) -> None:
    text = event({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "y" * 200_000}})
    async with RawUpstream(
        Reply(chunked(event(MESSAGE_START), text, event(MESSAGE_DELTA), MESSAGE_EVENTS[-1]))
    ) as server:
        found = await read(upstream, native_model(server), "messages")
        assert upstream.memory.used_bytes > 200_000
        found.clear()

    assert upstream.memory.used_bytes == 0


async def test_events_without_a_type_of_their_own_get_that_of_their_data(upstream: UpstreamClient) -> None:
    bare = [each.partition(b"\n")[2] for each in MESSAGE_EVENTS]
    async with RawUpstream(Reply(chunked(*bare))) as server:
        found = await read(upstream, native_model(server), "messages")

    assert relayed(found) == renamed("messages", MESSAGE_EVENTS)


async def test_json_on_several_lines_stays_on_several_lines(upstream: UpstreamClient) -> None:
    stop = b'event: message_stop\ndata: {\ndata:  "type": "message_stop"\ndata: }\n\n'
    async with RawUpstream(Reply(chunked(*MESSAGE_EVENTS[:-1], stop))) as server:
        found = await read(upstream, native_model(server), "messages")

    assert found[-1].with_model("ours") == stop


async def test_numbers_beyond_64_bits_and_escapes_stay_as_they_are(upstream: UpstreamClient) -> None:
    start = MESSAGE_EVENTS[0].replace(
        b'"input_tokens": 10', b'"input_tokens": 10, "x": [99999999999999999999, "\\u00fc\\/"]'
    )
    async with RawUpstream(Reply(chunked(start, *MESSAGE_EVENTS[1:]))) as server:
        found = await read(upstream, native_model(server), "messages")

    assert found[0].with_model("ours") == start.replace(b'"theirs"', b'"ours"')


async def test_a_response_that_comes_all_at_its_end_has_content(upstream: UpstreamClient) -> None:
    async with RawUpstream(Reply(chunked(RESPONSE_EVENTS[0], RESPONSE_EVENTS[-1]))) as server:
        found = await read(upstream, native_model(server), "responses")

    assert [has_content(each.body) for each in found] == [False, True]
    assert found[-1].native["response"]["output"] == RESPONSE_OUTPUT


async def test_tools_that_the_provider_runs_are_content_without_text(upstream: UpstreamClient) -> None:
    item = {"type": "response.output_item.done", "output_index": 0, "item": {"id": "ws_1", "type": "web_search_call"}}
    response = a_response(output=[item["item"]])
    end = event({"type": "response.completed", "response": response})
    async with RawUpstream(Reply(chunked(event(item), end)), plain(json.dumps(response).encode())) as server:
        found = await read(upstream, native_model(server), "responses")
        answer = await upstream.complete_native(
            native_model(server), NativeRequest("responses", DOCUMENTS["responses"])
        )

    assert [has_content(each.body) for each in (found[0], answer)] == [True, True]
    assert content_bytes(found[0].body) == 0


async def test_a_client_that_leaves_closes_the_upstreams_connection(upstream: UpstreamClient) -> None:
    head = STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n"
    events = (*THINKING_EVENTS[:2], *CALL_EVENTS)
    pieces = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in events]
    async with RawUpstream(Reply((head, *pieces), "hang")) as server:
        stream = PulledBlocks(
            await upstream.stream_native(native_model(server), NativeRequest("messages", DOCUMENTS["messages"]))
        )
        await anext(stream)
        await stream.aclose()
        await until(lambda: server.open == 0)


async def test_reasoning_in_parts_is_recognised_however_it_came(upstream: UpstreamClient) -> None:
    texts = ["First " * 20, "Then " * 30]
    item = {"id": "rs_1", "type": "reasoning", "summary": [{"type": "summary_text", "text": text} for text in texts]}
    kind = "response.reasoning_summary_text.delta"
    deltas = [
        event({"type": kind, "output_index": 0, "summary_index": number, "delta": piece})
        for number, text in enumerate(texts)
        for piece in (text[:9], text[9:])
    ]
    whole = a_response(output=[item, *RESPONSE_OUTPUT[1:]])
    end = event({"type": "response.completed", "response": whole})
    async with RawUpstream(Reply(chunked(*deltas, end)), plain(json.dumps(whole).encode())) as server:
        events = await read(upstream, native_model(server), "responses")
        answer = await upstream.complete_native(native_model(server), ASKED["responses"])

    expected, _ = fingerprints({"reasoning_content": "\n\n".join(texts)})
    found, _ = fingerprints(*(choice["delta"] for each in events for choice in each.body["choices"]))
    assert found == expected
    assert fingerprints(answer.body["choices"][0]["message"])[0] == expected
