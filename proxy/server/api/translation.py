"""How a client of another API is served by the one journey of a chat request.

    the client's JSON   ->  Translation.body, a chat body  ->  select, reserve, attempts
    the client's answer <-  Translation.answer             <-  a whole completion
    the client's events <-  Translation.stream             <-  chunks

Translators compute on plain dicts and bytes: no I/O, no clock, no randomness. They never change what they are given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from proxy.upstream.text_frame import TextRun

APIName = Literal["chat", "messages", "responses", "completions"]


@dataclass(frozen=True, slots=True)
class RelayedEvents:
    """What a client knows by the events that an upstream of its API has written."""

    model: str
    """Our name of it."""
    response: Mapping[str, Any] | None = None
    """The newest one; None: no event had one."""
    sequence_number: int | None = None
    """The newest one."""


class StreamTranslation(Protocol):
    """Turn the chunks of one stream into events of the client's API."""

    @property
    def keep_alive(self) -> bytes:
        """What is sent while the model is silent, once the stream has begun."""

    @property
    def answer(self) -> Mapping[str, Any] | None:
        """The whole answer as the client's API has it, once `finish` was called; None where nobody asks for it."""

    def write(self, chunk: Mapping[str, Any]) -> bytes:
        """Return the events of one chunk, with those that begin the answer if it is the first; often no bytes.

        The last chunk may hold nothing but `usage`.
        """

    def write_run(self, run: TextRun) -> bytes | None:
        """Return the events of chunks that are text alone; None: each of them must be given to `write`."""

    def finish(self) -> bytes:
        """Return the events that end a complete answer."""

    def fail(self, error: Mapping[str, Any], status: int) -> bytes:
        """Return the events that end an answer which failed, also before its first chunk.

        Args:
            error: OpenAI's error object: message, type, param, code.
            status: what it would have had as an HTTP response.
        """


class Translation(Protocol):
    """One request of another API, as a chat request, and its answer in the client's API."""

    @property
    def api(self) -> APIName: ...

    @property
    def document(self) -> Mapping[str, Any]:
        """The client's body, without UniRoute's own fields, for an upstream that speaks the client's API."""

    @property
    def body(self) -> Mapping[str, Any]:
        """The chat body. Its `model`, `stream`, `uniroute`, `models`, `provider` and `metadata` are the client's."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Fields of the client's body that no chat model can be sent, as paths: "tools[3] (web_search)"."""

    @property
    def stored(self) -> bool:
        """Whether later requests may ask for the answer by its id."""

    def answer(self, completion: Mapping[str, Any], model: str) -> dict[str, Any]:
        """Return a whole completion as the client's API has it. `model`: the registered name that answered."""

    def stream(self, model: str) -> StreamTranslation:
        """Begin a stream. `model`: the registered name that answers."""

    def fail_relayed(self, seen: RelayedEvents, error: Mapping[str, Any], status: int) -> bytes:
        """Return the events that end a failed stream whose events an upstream of the client's API has written.

        Arguments as of `StreamTranslation.fail`.
        """


def call_ids_in(messages: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """Return the ids of the tool calls in earlier turns. A new call may have none of them: clients would drop it."""
    calls = (call for message in messages for call in message.get("tool_calls") or ())
    return frozenset(call["id"] for call in calls if isinstance(call.get("id"), str))
