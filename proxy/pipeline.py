"""One chat request, from parsed body to response. Knows the order of things and nothing of how each is done."""

from __future__ import annotations

from starlette.responses import Response

from proxy.errors import UpstreamFailure
from proxy.recording.meter import Books, Meter
from proxy.relay.forwarding import Forwarder
from proxy.relay.marks import AnswerMarks
from proxy.relay.sse import dump
from proxy.relay.streaming import EventStream
from proxy.routing.choosing import Choice, choose
from proxy.routing.request import ChatRequest
from proxy.routing.thread import thread_of
from proxy.services import Services
from proxy.state.records import ClientKey
from proxy.trace import Trace

__all__ = ["Choice", "handle"]


async def handle(
    services: Services, request: ChatRequest, key: ClientKey | None, trace: Trace, started: float
) -> Response:
    """`started`: monotonic seconds at which the request arrived. Raises ProxyError before anything was sent."""
    state = services.state.current
    thread = await thread_of(services.conversations, request, key, services.settings)
    choice = await choose(request, key, state, services.settings, services.assigner, thread=thread)
    if choice.degraded:
        services.metrics.degraded.inc()
    if choice.left:
        services.metrics.conversations_moved.inc()
    books = Books(services.state, services.usage, services.metrics, services.live)
    marks = AnswerMarks(services.conversations, thread, request.body["messages"])
    meter = Meter(books, choice, key, trace, started, marks)
    forwarder = Forwarder(services.upstream, state, request, trace, meter)
    return await (_stream(forwarder) if request.stream else _complete(forwarder))


async def _complete(forwarder: Forwarder) -> Response:
    meter = forwarder.meter
    ending = "client_gone"
    try:
        answer = await forwarder.complete()
        ending = "complete"
        return Response(dump(answer), media_type="application/json", headers=meter.headers())
    except UpstreamFailure as failure:
        ending = "failed"
        _note(meter, failure)
        raise
    finally:
        meter.finish(ending)


async def _stream(forwarder: Forwarder) -> Response:
    meter = forwarder.meter
    ending: str | None = "client_gone"
    try:
        stream = await forwarder.open_stream()
        ending = None
    except UpstreamFailure as failure:
        ending = "failed"
        _note(meter, failure)
        raise
    finally:
        if ending is not None:
            meter.finish(ending)
    return EventStream(stream, meter, meter.headers(), include_usage=forwarder.request.include_usage)


def _note(meter: Meter, failure: UpstreamFailure) -> None:
    """Counted, and told with the decision that led there."""
    meter.failed(failure)
    failure.headers |= meter.headers()
