"""A failed import of litellm is logged and tried again: the reason may be temporary."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

from proxy.errors import LiteLLMUnavailable
from proxy.server.responses import render_error
from proxy.settings.schema import CircuitBreakerSettings, Settings
from proxy.storage.records import ModelRecord
from proxy.upstream import client as upstreams
from proxy.upstream.client import UpstreamClient
from proxy.upstream.health import HealthRegistry
from tests.support.direct_calls import BODY, a_model
from tests.support.makers import a_record
from tests.support.raw_upstream import RawUpstream, plain
from tests.support.waiting import until


class Broken:
    """Break a part of litellm's import, as one of the finders of modules."""

    tries = 0

    def find_spec(self, name: str, *_: Any) -> None:
        if name == "litellm._logging":
            self.tries += 1
            raise OSError(24, "Too many open files")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Broken:
    import litellm  # noqa: F401  # it is there once `monkeypatch` is undone

    for name in [name for name in sys.modules if name.partition(".")[0] == "litellm"]:
        monkeypatch.delitem(sys.modules, name)
    finder = Broken()
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    return finder


@pytest.fixture
async def upstream() -> AsyncIterator[UpstreamClient]:
    opened = UpstreamClient(Settings(), {})
    yield opened
    await opened.aclose()


def translated() -> ModelRecord:
    return a_record("foreign", model="anthropic/x", api_key="sk-arm-key")


async def test_a_failed_import_of_litellm_is_logged_and_tried_again(
    upstream: UpstreamClient, broken: Broken, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(upstreams, "MIN_RETRY_INTERVAL_S", 0.01)
    upstream.set_models({"foreign": translated()})
    await upstream.warm_up()
    with pytest.raises(LiteLLMUnavailable, match=r"OSError.*Too many open files"):
        await upstream.complete(translated(), BODY)
    assert upstream.not_ready == {"foreign"}
    assert "litellm cannot be imported" in caplog.text

    await until(lambda: broken.tries > 2)
    monkeypatch.undo()
    await until(lambda: not upstream.not_ready, timeout_s=60)
    await upstream.ensure_litellm()


@pytest.mark.usefixtures("broken")
async def test_models_that_are_called_directly_need_no_litellm(upstream: UpstreamClient) -> None:
    upstream.set_models({"foreign": translated()})
    async with RawUpstream(plain()) as server:
        answer = await upstream.complete(a_model(server, api_key="sk-arm-key"), BODY)

    assert answer.body["choices"]


@pytest.mark.usefixtures("broken")
async def test_without_litellm_the_caller_gets_a_retry_after_and_the_circuit_stays_closed(
    upstream: UpstreamClient,
) -> None:
    with pytest.raises(LiteLLMUnavailable) as caught:
        await upstream.complete(translated(), BODY)
    status, body, headers = render_error(caught.value)
    health = HealthRegistry(CircuitBreakerSettings())
    for _ in range(10):
        health.start_attempt("foreign").failed(caught.value)

    assert (status, body["error"]["code"], int(headers["retry-after"]) <= 10) == (503, "unavailable", True)
    assert not health.cooling_down()


@pytest.mark.usefixtures("broken")
async def test_no_module_is_left_of_a_failed_import(upstream: UpstreamClient) -> None:
    with pytest.raises(LiteLLMUnavailable):
        await upstream.ensure_litellm()

    assert not [name for name in sys.modules if name.partition(".")[0] == "litellm"]
