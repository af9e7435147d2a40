from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.server.api.client_apis import CLIENT_APIS
from proxy.server.api.translation import StreamTranslation
from proxy.upstream.chunk_reader import ChunkReader
from proxy.upstream.text_frame import TextRun
from tests.support.chunk_streams import one_by_one

ASKED: dict[str, dict[str, Any]] = {
    "/v1/messages": {"max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]},
    "/v1/responses": {"input": "hi", "store": False},
    "/v1/completions": {"prompt": "hi", "logprobs": 1},
}
TEXTS = ["The", "", ' "quoted"', "\n", "é\u2028", "\\", " x" * 200, "end"]


def begun(path: str) -> StreamTranslation:
    translate = CLIENT_APIS[path].translate
    assert translate is not None
    return translate({"model": "auto", **ASKED[path]}, answer_id="a", created_at=1).stream("small")


def blocks_of(texts: list[str], **choice: Any) -> list[Any]:
    """Return what a reader makes of chunks with these texts, the second to last in one piece."""
    events = [
        b"data: "
        + json.dumps({"id": "c", "choices": [{"index": 0, "delta": {"content": text}, **choice}]}).encode()
        + b"\n\n"
        for text in texts
    ]
    reader = ChunkReader()
    return [reader.feed(events[0]), reader.feed(b"".join(events[1:]))]


def events_of(written: bytes) -> list[Any]:
    return [json.loads(line[6:]) for line in written.split(b"\n") if line.startswith(b"data: {")]


@pytest.mark.parametrize("path", ASKED)
def test_chunks_of_text_together_are_translated_as_one_by_one(path: str) -> None:
    first, (run,) = blocks_of(TEXTS)
    together, apart = begun(path), begun(path)
    assert isinstance(run, TextRun)
    for stream in (together, apart):
        stream.write(first[0].body)
    written = together.write_run(run)
    one_at_a_time = [apart.write(chunk.body) for chunk in one_by_one([run])]

    assert written is not None
    assert events_of(written) == events_of(b"".join(one_at_a_time))
    assert events_of(together.finish()) == events_of(apart.finish())


@pytest.mark.parametrize(
    "choice", [{"index": 1}, {"logprobs": {"content": [{"token": "x", "logprob": -1.0}]}}], ids=["second", "logprobs"]
)
@pytest.mark.parametrize("path", ASKED)
def test_chunks_with_more_than_the_text_of_the_first_answer_are_translated_each(
    path: str, choice: dict[str, Any]
) -> None:
    _, (run,) = blocks_of(["a", "b", "c"], **choice)
    stream = begun(path)
    stream.write({"choices": [{"index": 0, "delta": {"content": "begun"}}]})

    assert stream.write_run(run) is None


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_chunks_of_text_wait_for_the_call_of_a_tool_before_them(path: str) -> None:
    call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": '{"a":'}}
    _, (run,) = blocks_of(["a", "b"])
    stream = begun(path)
    stream.write({"choices": [{"index": 0, "delta": {"content": "begun"}}]})
    stream.write({"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]})

    assert stream.write_run(run) is None
