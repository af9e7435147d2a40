from __future__ import annotations

import codecs
import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.storage.usage import usage_of
from proxy.upstream import chunk_reader
from proxy.upstream.chunk_reader import ChunkReader, is_finished
from proxy.upstream.errors import find_error
from proxy.upstream.payload import content_bytes, is_null_usage_chunk, simple_text
from proxy.upstream.text_frame import TextRun

PLAIN = st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters='"\\'), max_size=12)
ANY = st.text(max_size=12)
ODD = st.sampled_from(
    [
        '","content":"x',
        '"model":"gpt"',
        "\\",
        "\u2028",
        "é",
        "模型",
        "👩\u200d🔬",
        "\x00",
        "\n\n",
        "<0>",
        "<1>",
        "null",
        "",
        "x" * 5000,
    ]
)
# What servers write around an event.
WAYS = [
    *((b"data: ", b"\n\n"), (b"data: ", b"\n\n"), (b"data:", b"\n\n"), (b"data: ", b"\r\n\r\n")),
    *((b"data: ", b"\r\r"), (b"data:  ", b" \n\n"), (b"id: 7\ndata: ", b"\n\n"), (b"data: ", b"\nevent: message\n\n")),
]
USAGE = {"prompt_tokens": 3, "completion_tokens": 1}
CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
NAMES = ("small", "模型-2")
TEXTS = st.lists(st.one_of(PLAIN, PLAIN, ANY, ODD), min_size=1, max_size=14)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Draw a stream of chunks, most of them alike, as encoders write them, and some spoilt."""
    compact = draw(st.booleans())
    ascii_only = draw(st.booleans())
    separators = (",", ":") if compact else (", ", ": ")
    has_padding, has_model = draw(st.booleans()), draw(st.booleans())
    choices = draw(st.sampled_from([1, 1, 1, 2]))
    extra: dict[str, Any] = draw(
        st.sampled_from(
            [
                *({}, {"usage": None}, {"logprobs": None}, {"content": "twice"}, {"x_groq": {"id": "r"}}),
                *({"x_groq": {"usage": USAGE}}, {"usageMetadata": USAGE}, {"usage": USAGE}, {"error": None}),
                *({"metadata": {"model": "up", "content": "a"}}, {"object": "chat.completion.chunk", "type": "x"}),
            ]
        )
    )
    beside: dict[str, Any] = draw(
        st.sampled_from([{}, {}, {}, {"logprobs": None}, {"logprobs": {"content": []}}, {"usage": USAGE}])
    )
    name = draw(st.sampled_from(["up", "up", "a/b", "模", 'q"x', "\\u0000", "<0>", "<1>"]))
    model_first = draw(st.booleans())
    events = []
    for number, text in enumerate(draw(TEXTS)):
        index = number % choices
        delta: dict[str, Any] = {"content": text}
        if draw(st.integers(0, 9)) == 0:
            delta = draw(
                st.sampled_from(
                    [
                        *({"role": "assistant", "content": text}, {"reasoning": text}, {}, {"content": [text]}),
                        *({"content": text, "tool_calls": [CALL]}, {"tool_calls": [CALL]}, {"content": text, "x": ""}),
                    ]
                )
            )
        choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": None, **beside}
        chunk: dict[str, Any] = {"id": "c1", **({"model": name} if has_model and model_first else {})}
        chunk |= {"choices": [choice], **extra, **({"model": name} if has_model else {})}
        if has_padding:
            chunk["obfuscation"] = draw(st.one_of(PLAIN, ODD))
        data = json.dumps(chunk, ensure_ascii=ascii_only, separators=separators).encode("utf-8", "replace")
        if draw(st.integers(0, 11)) == 0:
            data = draw(spoilt(data))
        events.append(data)
    ends = [
        {"choices": [{"index": index, "delta": {}, "finish_reason": "stop"}], "model": "up"} for index in range(choices)
    ]
    events += [json.dumps(end).encode() for end in ends]
    before, after = draw(st.sampled_from(WAYS))
    start = draw(st.sampled_from([b"", b"", codecs.BOM_UTF8, b": hello\n\n"]))
    return start + b"".join(before + event + after for event in (*events, b"[DONE]"))


def spoilt(data: bytes) -> st.SearchStrategy[bytes]:
    half = len(data) // 2
    return st.sampled_from(
        [
            data.replace(b'"content"', b'"content":"first","content"', 1),
            data[:half] + b"\xff" + data[half:],
            data[:half] + b"\xed\xa0\x80" + data[half:],
            data[:half],
            data + b" ",
            b" " + data,
            data.replace(b"null", b"NaN"),
            data.replace(b"null", b'"stop"', 1),
            data.replace(b'"index": 0', b'"index": 0, "error": {"message": "no"}'),
            data.replace(b"}", b',"usage":{"prompt_tokens":1,"completion_tokens":1}}', 1),
        ]
    )


def read(stream: bytes, cuts: list[int], frames: int) -> tuple[list[tuple[Any, bytes, bytes]], str, int]:
    """Return each chunk as it is, and as it is sent under two names; how the stream ended; how many were framed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk_reader, "MAX_FRAMES", frames)
        reader = ChunkReader()
    chunks, framed = [], 0
    places = sorted({0, len(stream), *(cut % len(stream) for cut in cuts)})
    for start, end in pairwise(places):
        if not reader.done:
            for chunk in reader.feed(stream[start:end]):
                if isinstance(chunk, TextRun):
                    framed += len(chunk.texts)
                    check_text_alone(chunk)
                    chunks += as_sent(chunk)
                else:
                    chunks.append((chunk.body, chunk.with_model(NAMES[0]), chunk.with_model(NAMES[1])))
    error = reader.final_error
    return chunks, repr(error) if error is None else str(error), framed


def as_sent(run: TextRun) -> list[tuple[Any, bytes, bytes]]:
    first, second = (run.events(name).removesuffix(b"\n\n").split(b"\n\n") for name in NAMES)
    bodies = [chunk.body for chunk in run.chunks()]
    return list(zip(bodies, map(data_of, first), map(data_of, second), strict=True))


def data_of(event: bytes) -> bytes:
    assert event.startswith(b"data: ")
    return event[6:]


def check_text_alone(chunk: TextRun) -> None:
    """Check what the writer of a stream takes for granted: there is nothing to record but the size of the text."""
    assert simple_text(chunk.body) == chunk.text
    assert content_bytes(chunk.body) == chunk.size
    assert not usage_of(chunk.body)
    assert not is_finished(chunk.body)
    assert not is_null_usage_chunk(chunk.body)
    assert find_error(chunk.body) is None


@settings(max_examples=300)
@given(streams(), st.lists(st.integers(0, 10**6), max_size=6))
def test_chunks_recognised_by_their_frame_are_those_that_are_parsed(stream: bytes, cuts: list[int]) -> None:
    exact, by_frame = read(stream, cuts, 0), read(stream, cuts, 8)

    assert by_frame[:2] == exact[:2]
    assert exact[2] == 0


def chunk_of(text: str, **more: Any) -> bytes:
    chunk = {"id": "c", "model": "up", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    return b"data: " + json.dumps({**chunk, **more}, ensure_ascii=False).encode() + b"\n\n"


@pytest.mark.parametrize("more", [{}, {"obfuscation": "aBc"}])
def test_plain_text_of_a_stream_is_parsed_once(more: dict[str, Any]) -> None:
    texts = ["The", " capital", " of", " 法国", " is", " Paris", "."]
    stream = b"".join(chunk_of(text, **more) for text in texts)

    chunks, _, framed = read(stream, [], 8)

    assert framed == len(texts) - 1
    assert [body["choices"][0]["delta"]["content"] for body, _, _ in chunks] == texts
    assert json.loads(chunks[3][1])["model"] == "small"


@pytest.mark.parametrize("text", ['say "x"', "a\\b", "two\nlines", "tab\t", "\\", '\\","content":"', "é\u2028"])
def test_text_with_escapes_is_recognised_too(text: str) -> None:
    chunks, _, framed = read(chunk_of("a") + chunk_of(text) + chunk_of("b"), [], 8)

    assert framed == 2
    assert chunks[1][0]["choices"][0]["delta"]["content"] == text
    assert json.loads(chunks[1][1])["choices"][0]["delta"]["content"] == text
