"""Fuzz the SSE decoder, guided by coverage: `python -m tests.fuzz.events CORPUS`. Ends at a fault.

However the bytes are split, the events are the same, and each is read or refused.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["proxy.upstream.sse", "proxy.upstream.payload", "json"]):
    from proxy.upstream.chunk_reader import ChunkReader, Parse
    from proxy.upstream.payload import (
        JSONPayload,
        finish_reasons,
        has_content,
        is_empty_completion,
        is_usage_chunk,
        parse,
        parse_exact,
    )
    from proxy.upstream.sse import SSEDecoder, format_event


def one_input(data: bytes) -> None:
    """Decode one input. Its first two bytes say how large the pieces are."""
    raw = data[2:]
    whole = _cut([raw])
    for size in {1 + byte % 16 for byte in data[:2]}:
        if _cut([raw[start : start + size] for start in range(0, len(raw), size)]) != whole:
            raise AssertionError("another split, other events")
    for found in whole:
        for exact, quick in zip(_read(found, parse_exact), _read(found, parse), strict=False):
            chunk, shown = exact.body, quick.with_model("m")
            has_content(chunk), is_empty_completion(chunk), is_usage_chunk(chunk), finish_reasons(chunk)
            if len(_cut([format_event(chunk)])) != 1 or _cut([b"data: " + shown + b"\n\n"]) != [shown]:
                raise AssertionError("one chunk is not one event")


def _cut(pieces: list[bytes]) -> list[bytes]:
    cutter = SSEDecoder()
    return [data for piece in pieces for data in cutter.feed(piece)] + cutter.close()


def _read(data: bytes, parser: Parse) -> list[JSONPayload]:
    """Return the chunks of one event."""
    lines = b"".join(b"data: " + line + b"\n" for line in data.split(b"\n"))
    return ChunkReader(parser).feed(lines + b"\n")


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
