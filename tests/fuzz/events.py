"""Fuzz the SSE decoder, guided by coverage: `python -m tests.fuzz.events CORPUS`. Ends at a fault.

However the bytes are split, the events are the same, and each is read or refused.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["proxy.upstream.sse", "proxy.upstream.payload", "json"]):
    from proxy.errors import UpstreamError
    from proxy.upstream.chunk_reader import parse_chunk
    from proxy.upstream.payload import finish_reasons, has_content, is_empty_completion, is_usage_chunk, parse_exact
    from proxy.upstream.sse import SSEDecoder, format_event


def one_input(data: bytes) -> None:
    """Decode one input. Its first two bytes say how large the pieces are."""
    raw = data[2:]
    whole = _cut([raw])
    for size in {1 + byte % 16 for byte in data[:2]}:
        if _cut([raw[start : start + size] for start in range(0, len(raw), size)]) != whole:
            raise AssertionError("another split, other events")
    for found in whole:
        try:
            chunk, renamed = parse_chunk(found, parse_exact).body, parse_chunk(found).with_model("m")
        except UpstreamError:
            continue
        has_content(chunk), is_empty_completion(chunk), is_usage_chunk(chunk), finish_reasons(chunk)
        if len(_cut([format_event(chunk)])) != 1 or _cut([b"data: " + renamed + b"\n\n"]) != [renamed]:
            raise AssertionError("one chunk is not one event")


def _cut(pieces: list[bytes]) -> list[bytes]:
    cutter = SSEDecoder()
    return [data for piece in pieces for data in cutter.feed(piece)] + cutter.close()


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
