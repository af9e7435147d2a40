"""Grade answers in a process of its own: `python -m router_core.validation.grading_process`.

Reads lines `{"grader": {…}, "answer": "…"}` from stdin and writes a line `{"score": 0.5, "error": null}` for each, with
a null score if there is none. Before the first it writes the line READY. An answer that takes more than CPU_S seconds
ends the process; one that takes more than MEMORY_BYTES is an error.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from functools import lru_cache
from typing import BinaryIO

from router_core.validation.graders import Grader, parse_grader

READY = b"ready\n"
CPU_S = 2
MEMORY_BYTES = 2**30
_NICENESS = 5


def main() -> None:
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # a stray print must not become a score
    # jsonschema imports it if it can, which takes a second, and it is not used here.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    _limit_resources()
    _write(replies, READY)
    for line in requests:
        _write(replies, json.dumps(_grade(line)).encode() + b"\n")


def _grade(line: bytes) -> dict[str, object]:
    used = sum(os.times()[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used) + CPU_S, resource.RLIM_INFINITY))
    request = json.loads(line)
    try:
        score = float(_grader(json.dumps(request["grader"])).grade(request["answer"]))
    except Exception as error:  # noqa: BLE001 - this answer has no score, and the next one may have
        return {"score": None, "error": type(error).__name__}
    return {"score": None if math.isnan(score) else score, "error": None}


@lru_cache(maxsize=256)
def _grader(spec: str) -> Grader:
    return parse_grader(json.loads(spec))


def _limit_resources() -> None:
    os.nice(_NICENESS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # elsewhere the limit is ignored, or counts memory that was only reserved
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))


def _write(replies: BinaryIO, line: bytes) -> None:
    replies.write(line)
    replies.flush()


if __name__ == "__main__":
    main()
