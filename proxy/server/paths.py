from __future__ import annotations

import difflib

CHAT, MODELS, ROUTE = "/v1/chat/completions", "/v1/models", "/v1/route"

PLAIN_PATHS = frozenset({CHAT, MODELS, ROUTE, "/healthz", "/readyz", "/metrics", "/openapi.json"})
"""What is served beside `/v1/models/NAME` and the admin side."""

_SERVED = (
    f"POST {CHAT} and {ROUTE}; GET {MODELS}, {MODELS}/NAME, /healthz, /readyz, /metrics and /openapi.json;"
    " and the admin side under /admin"
)

_OTHERS = {
    "/openai/deployments": "this is Azure's path: use the client for OpenAI itself, with the deployment as `model`",
    "/openai": "the base URL of this server ends in /v1, without /openai",
    "/v1/v1": "the client adds /v1 to a base URL that has it already: give it once",
    "/v1/messages": "this is Anthropic's API: use a client of OpenAI's chat completions",
    "/v1/responses": "only OpenAI's chat completions are served: choose that API in the client",
    "/v1/completions": "only OpenAI's chat completions are served: choose that API in the client",
    "/v1/embeddings": "models are asked for chat completions alone; embeddings need another server",
    "/v1beta": "this is Gemini's API: use a client of OpenAI's chat completions",
    "/api": "this is Ollama's API: use a client of OpenAI's chat completions",
}


def meant_path(path: str) -> str | None:
    """The served path that `path` is but for doubled slashes, a last slash or a missing /v1; None where it is none.

    Never one of the admin side, which has one spelling. Dots and encoded slashes are parts of a name, as in any path.
    """
    if path.startswith(f"{MODELS}/") and not path.endswith("/"):
        return None
    parts = [part for part in path.split("/") if part]
    plain = "/" + "/".join(parts)
    if plain in PLAIN_PATHS:
        return plain
    within = parts[1:] if parts[:1] == ["v1"] else parts
    if within[:1] == ["models"] and len(within) > 1:
        name = path.partition("models")[2].strip("/")
        return f"{MODELS}/{name}"
    versioned = "/v1/" + "/".join(within)
    return versioned if versioned in (CHAT, MODELS, ROUTE) else None


def unknown_path(method: str, path: str) -> str:
    """Name what was asked, what is served and what was probably meant."""
    plain = "/" + "/".join(part for part in path.split("/") if part)
    mistake = next((words for start, words in _OTHERS.items() if f"{plain}/".startswith(f"{start}/")), None)
    near = difflib.get_close_matches(plain[:200], PLAIN_PATHS, n=1, cutoff=0.7)
    hint = f"; {mistake}" if mistake else f"; did you mean {near[0]}?" if near else ""
    return f"nothing is served at {method[:20]} {path[:200]}{hint}. Served are {_SERVED}"
