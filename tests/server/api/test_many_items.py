"""Requests and answers of very many items take time in proportion to their number."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from time import process_time
from typing import Any

import pytest

from proxy.server.api.adaptation import adapt
from proxy.server.api.messages_request import translate as translate_messages
from proxy.server.api.responses_request import translate as translate_responses
from tests.support.makers import PRICED, a_record

ID = "0123456789abcdef0123456789abcdef"
FEW, MANY = 500, 6000
# A quadratic time grows 144 times, a linear one 12 times.
MAX_GROWTH = 50

LOCAL = a_record("local", info=PRICED)
USER: Any = {"role": "user", "content": "hi"}


def messages(*turns: Any, **more: Any) -> object:
    translation = translate_messages(
        {"model": "m", "max_tokens": 9, "messages": [USER, *turns], **more}, answer_id=ID, created_at=1
    )
    return adapt(translation.body, LOCAL)


def responses(*items: Any, **more: Any) -> object:
    translation = translate_responses({"model": "m", "input": [USER, *items], **more}, answer_id=ID, created_at=1)
    return adapt(translation.body, LOCAL)


def calls_of(count: int) -> list[Any]:
    called = [{"type": "tool_use", "id": f"c{n}", "name": "f", "input": {}} for n in range(count)]
    results = [{"type": "tool_result", "tool_use_id": f"c{n}", "content": "r"} for n in range(count)]
    return [{"role": "assistant", "content": called}, {"role": "user", "content": results}]


SYSTEM = {"role": "system", "content": "x" * 1500}
SAID = {"role": "assistant", "content": "x"}
REQUESTS: dict[str, Callable[[int], object]] = {
    "system turns": lambda count: messages(SAID, *[SYSTEM] * count, USER),
    "system turns between others": lambda count: messages(SAID, *[SYSTEM, USER] * count),
    "calls": lambda count: messages(*calls_of(count)),
    "long names of tools": lambda count: messages(
        tools=[{"name": f"{'n' * 80}{n}", "input_schema": {}} for n in range(count)]
    ),
    "system items": lambda count: responses(*[{"role": "developer", "content": "x" * 1500}] * count),
    "calls of one id": lambda count: responses(
        *[{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}] * count
    ),
    "tools of one name": lambda count: responses(tools=[{"type": "custom", "name": "t"}] * count),
    "shells": lambda count: responses(tools=[{"type": "local_shell"}] * count),
    "namespaces of one joined name": lambda count: responses(
        tools=[
            {"type": "namespace", "name": chr(0x4E00 + n), "tools": [{"type": "custom", "name": "t"}]}
            for n in range(count)
        ]
    ),
}


def seconds(work: Callable[[int], object], count: int) -> float:
    gc.collect()
    start = process_time()
    work(count)
    return process_time() - start


def growth(work: Callable[[int], object]) -> float:
    work(FEW)
    gc.freeze()  # a collection would look through all that the tests before have imported
    try:
        return seconds(work, MANY) / max(0.001, *(seconds(work, FEW) for _ in range(3)))
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_of_many_items_is_translated_in_linear_time(name: str) -> None:
    assert growth(REQUESTS[name]) < MAX_GROWTH


def delta(**members: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": members, "finish_reason": None}]}


def call(index: int, arguments: str = "", **named: str) -> dict[str, Any]:
    stated = {"index": index, "function": {"arguments": arguments, **({"name": "f"} if named else {})}, **named}
    return delta(tool_calls=[stated])


WAITING = [call(0, '{"a": [', id="c0"), call(1, id="c1")]
ANSWERS: dict[str, Callable[[int], Iterable[Any]]] = {
    "a long call before another": lambda count: [*WAITING, *[call(0, '"word",')] * count],
    "a long call of braces": lambda count: [*WAITING, *[call(0, "{},{}")] * count],
    "text behind a call": lambda count: [call(0, '{"a": [', id="c0"), *[delta(content="x")] * count],
    "calls": lambda count: [call(n, "{}", id=f"c{n}") for n in range(count)],
    "pieces of a name": lambda count: [
        delta(tool_calls=[{"index": 0, "function": {"name": f"n{n}", "arguments": ""}}]) for n in range(count)
    ],
}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("translate", [translate_messages, translate_responses], ids=["messages", "responses"])
def test_an_answer_of_many_chunks_is_translated_in_linear_time(translate: Callable[..., Any], name: str) -> None:
    request = {"model": "m", "max_tokens": 9, "messages": [USER], "input": "hi"}

    def work(count: int) -> None:
        stream = translate(request, answer_id=ID, created_at=1).stream("m")
        for chunk in ANSWERS[name](count):
            stream.write(chunk)
        stream.finish()

    assert growth(work) < MAX_GROWTH
