"""The APIs that clients speak. A request of another than chat is translated, and so is its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from proxy.server.api import messages_request, responses_request, text_completions
from proxy.server.api.translation import APIName, Translation
from proxy.server.requests import Headers


class Translator(Protocol):
    def __call__(self, document: Mapping[str, Any], *, answer_id: str, created_at: int) -> Translation:
        """Translate a request.

        Args:
            answer_id: 32 hexadecimal digits, of which the ids of the answer are made.
            created_at: Unix seconds.

        Raises:
            BadRequest: naming the field as the client wrote it.
        """


@dataclass(frozen=True, slots=True)
class ClientAPI:
    name: APIName
    path: str
    translate: Translator | None = None
    """None: nothing has to be translated."""


CHAT = ClientAPI("chat", "/v1/chat/completions")

MESSAGES = ClientAPI("messages", "/v1/messages", messages_request.translate)

RESPONSES = ClientAPI("responses", "/v1/responses", responses_request.translate)

TEXT_COMPLETIONS = ClientAPI("completions", "/v1/completions", text_completions.translate)

# The APIs in which a client asks a model for an answer.
CLIENT_APIS = {api.path: api for api in (CHAT, MESSAGES, RESPONSES, TEXT_COMPLETIONS)}

EMBEDDINGS, MODELS, ROUTE, FEEDBACK = "/v1/embeddings", "/v1/models", "/v1/route", "/v1/feedback"

COUNT_TOKENS, INPUT_TOKENS = f"{MESSAGES.path}/count_tokens", f"{RESPONSES.path}/input_tokens"

# Not served: what it answers can be read by the model alone that made it.
COMPACT = f"{RESPONSES.path}/compact"

# All of a client's paths, but for those that end in the name of a model or in the id of a response.
CLIENT_PATHS = frozenset({*CLIENT_APIS, COUNT_TOKENS, INPUT_TOKENS, EMBEDDINGS, FEEDBACK, MODELS, ROUTE})

# Headers of a client that only an upstream of the client's own API can read.
NATIVE_HEADERS = ("anthropic-version", "anthropic-beta")

# Paths that no client of Anthropic's API asks for, whatever headers it sends.
_OF_OTHER_APIS = frozenset({CHAT.path, RESPONSES.path, TEXT_COMPLETIONS.path, EMBEDDINGS, ROUTE})


def speaks_messages(path: str, headers: Headers) -> bool:
    """Return whether a client expects what it is sent in the shapes of Anthropic's API, also at unknown paths."""
    if path == MESSAGES.path or path.startswith(f"{MESSAGES.path}/"):
        return True
    return path not in _OF_OTHER_APIS and bool(headers.getlist("anthropic-version"))
