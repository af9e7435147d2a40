"""One chat request, from parsed body to response. Knows the order of things and nothing of how each is done."""

from __future__ import annotations

from starlette.responses import Response

from proxy.errors import UpstreamFailure
from proxy.limits.claims import claim_of
from proxy.limits.standing import Granted
from proxy.recording.meter import Books, Meter
from proxy.relay.chunks import content_bytes
from proxy.relay.forwarding import Forwarder
from proxy.relay.sse import dump
from proxy.relay.streaming import EventStream
from proxy.routing.choosing import Choice, choose
from proxy.routing.request import ChatRequest
from proxy.services import Services
from proxy.state.records import ClientKey
from proxy.state.snapshot import RoutingState
from proxy.trace import Trace

__all__ = ["Choice", "handle"]


async def handle(
    services: Services, request: ChatRequest, key: ClientKey | None, trace: Trace, started: float
) -> Response:
    """`started`: monotonic seconds at which the request arrived. Raises ProxyError before anything was sent."""
    state = services.state.current
    choice = await choose(request, key, state, services.settings, services.assigner)
    if choice.degraded:
        services.metrics.degraded.inc()
    books = Books(services.state, services.usage, services.metrics, services.live)
    granted = await _granted(services, state, choice, key)
    meter = Meter(books, choice, key, trace, started, granted)
    forwarder = Forwarder(services.upstream, state, request, trace, meter)
    return await (_stream(forwarder) if request.stream else _complete(forwarder))


async def _granted(services: Services, state: RoutingState, choice: Choice, key: ClientKey | None) -> Granted | None:
    """The one round trip to Redis before a request is sent, for keys that have limits."""
    if key is None or not key.limits.any:
        return None
    return await services.limiter.reserve(key, claim_of(choice, state, services.settings, key.limits))


async def _complete(forwarder: Forwarder) -> Response:
    meter = forwarder.meter
    ending = "client_gone"
    try:
        answer = await forwarder.complete()
        meter.received(content_bytes(answer))
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
