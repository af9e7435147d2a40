from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.server.conftest import Fleet
from tests.support.scripted_answers import Step

ODD = (
    b'"zzz" : {"y":[1.0,1e2,-0.0,1.5E+3 , 12345678901234567890123456789],"model":"auto","\\u0061\\/":null,\t"b":{}},'
    b' "temperature":1.0, "top_p":1e0'
)
MESSAGES = (
    b'"messages":[ {"role":"user", "content":"caf\\u00e9 \\/ \xe5\xad\x97\\n \\"model\\":\\"auto\\" {}",'
    b'"n1":{"model":"x"}}]'
)
TOOLS = (
    b'"tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object",'
    b'"properties":{"model":{"type":"string","enum":["auto"]},"stream_options":{}}}}}]'
)
BODIES = [
    b'{"model":"fair",' + MESSAGES + b"," + ODD + b"," + TOOLS + b"}",
    b'{ "model" : "fair" , ' + MESSAGES + b"," + ODD + b" }",
    b"{" + ODD + b"," + MESSAGES + b"," + TOOLS + b',"model":"fair"}',
    b"\r\n{\n\t" + TOOLS + b",\n\t" + MESSAGES + b',\n\t"model"\n:\n"fair"\n,' + ODD + b"}\n ",
    b'{"x\\"model":"fair","model":"fair",' + MESSAGES + b"}",
]
ASKS_USAGE = b'"stream_options":{"include_usage":true}'
NAMED, UPSTREAMS = b'"fair"', b'"fair-upstream"'


def post(http: httpx.Client, raw: bytes) -> httpx.Response:
    reply = http.post("/v1/chat/completions", content=raw, headers={"content-type": "application/json"})
    assert reply.status_code == 200, reply.text
    return reply


def renamed(raw: bytes) -> bytes:
    """Return the body as it goes upstream: the last of these members is the outermost, if there are several."""
    before, mark, after = raw.rpartition(NAMED)
    return before + UPSTREAMS + after if mark else raw


@pytest.mark.parametrize("raw", BODIES)
def test_a_body_arrives_as_the_caller_wrote_it(http: httpx.Client, fleet: Fleet, raw: bytes) -> None:
    post(http, raw)

    assert fleet.fair.last.raw == renamed(raw)


@pytest.mark.parametrize("raw", BODIES)
def test_a_streaming_request_gets_the_option_for_usage_as_its_first_field(
    http: httpx.Client, fleet: Fleet, raw: bytes
) -> None:
    head, brace, rest = raw.partition(b"{")
    post(http, head + brace + b'"stream":true, ' + rest)

    assert fleet.fair.last.raw == renamed(head + brace + ASKS_USAGE + b',"stream":true, ' + rest)


@pytest.mark.parametrize("raw", BODIES)
def test_a_streaming_request_that_asks_for_usage_is_sent_as_it_is(http: httpx.Client, fleet: Fleet, raw: bytes) -> None:
    head, brace, rest = raw.partition(b"{")
    asking = head + brace + b'"stream_options" : {"include_usage":true,"y":1e2}, "stream" : true, ' + rest
    post(http, asking)

    assert fleet.fair.last.raw == renamed(asking)


def test_without_our_own_fields_nothing_else_changes_in_value(http: httpx.Client, fleet: Fleet) -> None:
    ours = b'"uniroute":{"lambda":0.1},"models":["fair"],"provider":{"allow_fallbacks":true},'
    raw = b"{" + ours + b'"model":"auto",' + MESSAGES + b"," + ODD + b"," + TOOLS + b"}"
    post(http, raw)
    sent = raw.replace(ours, b"").replace(b'{"model":"auto"', b'{"model":"fair-upstream"')

    assert repr(json.loads(fleet.fair.last.raw)) == repr(json.loads(sent))


ANSWER = (
    b'"choices":[{"message":{"content":"\\u00e9\\/\xe5\xad\x97 \\"model\\": \\"theirs\\"","x":{"model":"theirs"}},'
    b'"index":0 , "finish_reason":"stop", "logprobs":{"token_logprobs":[-1e2,1.0,0.10]} }],' + ODD
)
ANSWERS = [
    b'{"id":"x","model":"theirs",' + ANSWER + b"}",
    b'{"id":"x", "model": "theirs", ' + ANSWER + b" }",
    b"{" + ANSWER + b',"model":"theirs","y":{"x":1.0}}',
    b'\n{\n  "model" :\t"theirs",\n' + ANSWER + b"\n}\n",
    b'{"x\\"model":"theirs",' + ANSWER + b',"model":"theirs"}',
    b'{"model":"th\\u0065irs",' + ANSWER + b"}",
]


def parsed(raw: bytes) -> bytes:
    """Return the response as the client gets it. The outermost member is the first or the last of its kind."""
    theirs = b'"th\\u0065irs"' if b"u0065" in raw else b'"theirs"'
    if raw.index(theirs) < raw.index(b'"choices"') and not raw.startswith(b'{"x'):
        return raw.replace(theirs, NAMED, 1)
    before, _, after = raw.rpartition(theirs)
    return before + NAMED + after


@pytest.mark.parametrize("raw", ANSWERS)
def test_a_response_is_passed_on_as_the_upstream_wrote_it(http: httpx.Client, fleet: Fleet, raw: bytes) -> None:
    fleet.fair.then(Step(body=raw))

    assert post(http, BODIES[0]).content == parsed(raw)


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
@pytest.mark.parametrize("raw", ANSWERS)
def test_a_stream_is_passed_on_as_the_upstream_wrote_it(
    http: httpx.Client, fleet: Fleet, raw: bytes, end: bytes
) -> None:
    chunk = b" ".join(raw.replace(b'"message"', b'"delta"').split(b"\n")).strip()
    fleet.fair.then(Step(events=[b"data: " + chunk + end, b": ping" + end, b"data:" + chunk + end]))
    body = b'{"stream":true,' + ASKS_USAGE + b"," + BODIES[0][1:]

    assert post(http, body).content == (b"data: " + parsed(chunk) + b"\n\n") * 2 + b"data: [DONE]\n\n"


def test_usage_that_was_not_requested_is_left_out_and_nothing_else_changes_in_value(
    http: httpx.Client, fleet: Fleet
) -> None:
    used = b'"usage":{"prompt_tokens":1,"completion_tokens":2}'
    chunk = ANSWERS[2].replace(b'"message"', b'"delta"').replace(b'"y":{"x":1.0}', used)
    alone = b'{"model":"theirs","choices":[],' + used + b"}"
    fleet.fair.then(Step(events=[b"data: " + chunk + b"\n\n", b"data: " + alone + b"\n\n"]))
    events = post(http, b'{"stream":true,' + BODIES[0][1:]).content.split(b"\n\n")
    expected: Any = {**json.loads(chunk), "model": "fair"}
    del expected["usage"]

    assert [event[:6] for event in events] == [b"data: ", b"data: ", b""]
    assert repr(json.loads(events[0][6:])) == repr(expected)
    assert events[1] == b"data: [DONE]"
