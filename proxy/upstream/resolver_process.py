"""litellm asked who serves some models, in a process of its own: `python -m proxy.upstream.resolver_process`.

Reads a question on each line of stdin, in JSON, and writes an answer, `resolved` or `refused`, on a line of stdout.
Whoever only relays so never holds litellm, which takes seconds and 190 MiB to import. No key is in its environment.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from typing import Any

from proxy.upstream.litellm.setup import import_litellm
from proxy.upstream.provider_resolution import NotResolved, resolve_with_litellm

MAX_MEMORY = 2**30
"""Bytes of address space. 300 MiB are what litellm takes, 190 of them in memory."""

ODD = (ValueError, TypeError, LookupError, AttributeError)
"""What litellm stumbles into over a name of another shape than it expects."""


def answer(litellm: Any, asked: dict[str, Any]) -> dict[str, Any]:
    import openai

    try:
        return {"resolved": resolve_with_litellm(litellm, asked, asked["forward"]).to_json()}
    except NotResolved as error:
        return {"refused": str(error)}
    except (openai.OpenAIError, *ODD):
        return {"refused": f"no provider is known by its name {asked['model'][:128]!r}"}


def bound_memory() -> None:
    """So that whatever litellm makes of a name takes this process down and not the machine."""
    with contextlib.suppress(OSError, ValueError):  # less is allowed already, or this system knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))


def main() -> None:
    bound_memory()
    out, sys.stdout = sys.stdout, sys.stderr  # litellm prints hints
    litellm = None
    for line in sys.stdin:
        litellm = litellm or import_litellm()
        print(json.dumps(answer(litellm, json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
