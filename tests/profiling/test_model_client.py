from __future__ import annotations

from typing import Any

import pytest

from proxy.errors import ResponseMemoryFull, ResponseTooLarge, UpstreamError
from proxy.profiling.model_client import MAX_GRADED_CHARS, ModelCallError, UpstreamModelClient, read_answer
from proxy.storage.records import ModelRecord
from tests.support.makers import a_record

ASK = {"messages": [{"role": "user", "content": "hi"}]}


class Failing:
    def __init__(self, failure: UpstreamError) -> None:
        self._failure = failure

    async def complete(self, *_: Any) -> Any:
        raise self._failure


def completion(content: Any, **more: Any) -> Any:
    choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "stop", **more}
    return {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}


@pytest.mark.parametrize(
    "content",
    ["x" * 3_000_000, [{"type": "text", "text": "x" * 3_000_000}], [{"type": "text", "text": "x" * 400}] * 10_000],
)
def test_an_answer_is_cut_before_it_is_graded(content: Any) -> None:
    assert read_answer(completion(content), 0.1, "small").text == "x" * MAX_GRADED_CHARS


@pytest.mark.parametrize("content", [None, 7, {}, [7, {"text": 7}, {"text": None}, {"text": ["x"]}]])
def test_content_that_is_no_text_is_an_empty_answer(content: Any) -> None:
    assert read_answer(completion(content), 0.1, "small").text == ""


def test_the_record_of_an_odd_answer_is_small() -> None:
    odd = completion("hi", finish_reason={"a": "x" * 1000})
    odd["usage"] = {"prompt_tokens": 10**400, "completion_tokens": 10**20}
    answer = read_answer(odd, 0.1, "small")
    long = read_answer(completion("hi", finish_reason="x" * 1000), 0.1, "small")

    assert (answer.finish_reason, answer.counts.prompt_tokens, answer.counts.output_tokens) == (None, None, None)
    assert len(long.finish_reason or "") == 40


async def failed(failure: UpstreamError, record: ModelRecord) -> ModelCallError:
    with pytest.raises(ModelCallError) as caught:
        await UpstreamModelClient(Failing(failure)).complete(record, ASK, max_tokens=5, timeout_s=5)
    return caught.value


async def test_an_answer_that_is_too_large_is_not_retried() -> None:
    assert not (await failed(ResponseTooLarge("too large"), a_record())).retryable
    assert (await failed(ResponseMemoryFull("no room"), a_record())).retryable


@pytest.mark.parametrize("headers", [{"retry-after": "9" * 90}, {"Retry-After-Ms": "9" * 30}])
async def test_every_retry_wait_is_bounded(headers: dict[str, str]) -> None:
    failure = await failed(UpstreamError("slow", status=429, headers=headers), a_record())

    assert failure.retry_after_s == 3600
