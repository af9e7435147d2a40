"""Fuzz the parser of bodies, guided by coverage: `python -m tests.fuzz.parser CORPUS`. Ends at a fault.

What is accepted is written and read again, and read by everything that reads a body before it is forwarded.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["proxy.routing", "json"]):
    from proxy.errors import BadRequest
    from proxy.json_text import encode_json
    from proxy.routing.chat_request import parse_chat
    from proxy.routing.requirements import requirements_of, routing_text


def one_input(data: bytes) -> None:
    """Parse one input. Its first byte says how much of the rest is a header; what follows is the body."""
    cut = data[0] % 24 if data else 0
    header, raw = data[1 : 1 + cut].decode("latin-1"), data[1 + cut :]
    try:
        request = parse_chat(raw, [("lambda", header)] if header else [])
    except BadRequest:
        return
    routing_text(request.body["messages"])
    requirements_of(request.body)
    if parse_chat(encode_json(request.body), []).body != request.body:
        raise AssertionError("what was written is not what was read")


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
