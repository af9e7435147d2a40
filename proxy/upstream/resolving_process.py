"""litellm asked who serves some models, in a process of its own: `python -m proxy.upstream.resolving_process`.

Reads a JSON list of questions on stdin and writes a list of answers, each `resolved` or `refused`, on stdout. Whoever
only relays so never holds litellm, which takes seconds and 150 MiB to import. No key is in its environment.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from proxy.upstream.provider_layer import import_litellm
from proxy.upstream.resolution import NotResolved, by_litellm

ODD = (ValueError, TypeError, LookupError, AttributeError)
"""What litellm stumbles into over a name of another shape than it expects."""


def answer(litellm: Any, asked: dict[str, Any]) -> dict[str, Any]:
    import openai

    try:
        return {"resolved": by_litellm(litellm, asked, asked["forward"]).to_json()}
    except NotResolved as error:
        return {"refused": str(error)}
    except (openai.OpenAIError, *ODD):
        return {"refused": f"no provider is known by its name {asked['model'][:128]!r}"}


def main() -> None:
    asked = json.load(sys.stdin)
    out, sys.stdout = sys.stdout, sys.stderr  # litellm prints hints
    litellm = import_litellm()
    json.dump([answer(litellm, each) for each in asked], out)


if __name__ == "__main__":
    main()
