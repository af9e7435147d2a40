"""What is sent as metrics, what variables say, and what becomes of requests while the collector takes nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from proxy.app import from_settings
from proxy.observability.otlp import is_enabled, open_telemetry
from proxy.observability.tracing import TracedEndpoints
from proxy.server.metrics import Metrics
from proxy.server.model_endpoints import ModelEndpoints
from proxy.settings.schema import Settings
from tests.observability.conftest import Observed, observed_proxy
from tests.support.command import ADMIN_KEY, ServeCommand, environment
from tests.support.otlp_receiver import OTLPReceiver
from tests.support.proxy_process import model_entry
from tests.support.scripted_answers import Step
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until

ROOT_KEY = {"authorization": f"Bearer {ADMIN_KEY}"}
CHAT = {"model": "auto", "messages": [{"role": "user", "content": "What is 2 + 2?"}]}
EMBEDDING = {
    "object": "list",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.5]}],
    "model": "theirs",
    "usage": {"prompt_tokens": 7, "total_tokens": 7},
}


def counted(observed: Observed, name: str, **attributes: Any) -> int:
    return sum(point.count for point in observed.receiver.points(name, **attributes))


def test_calls_and_requests_are_counted_under_the_names_of_the_convention(observed: Observed) -> None:
    receiver = observed.receiver
    failed = {"gen_ai__request__model": "fair-upstream", "error__type": "500"}
    before = counted(observed, "gen_ai.client.operation.duration", **failed)
    observed.fair.then(Step(status=500))
    observed.traced(stream=True)
    assert wait_until(lambda: counted(observed, "gen_ai.client.operation.duration", **failed) == before + 1)
    (point,) = receiver.points("gen_ai.client.operation.duration", gen_ai__response__model="good")
    assert point.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "good-upstream",
        "gen_ai.response.model": "good",
        "server.address": "127.0.0.1",
        "server.port": observed.good.port,
    }
    assert (point.bounds[0], point.bounds[-1], point.is_delta) == (0.01, 81.92, False)
    kinds = {each.attributes["gen_ai.token.type"] for each in receiver.points("gen_ai.client.token.usage")}
    assert kinds == {"input", "output"}
    assert receiver.points("gen_ai.client.operation.time_to_first_chunk", gen_ai__response__model="good")
    (request,) = receiver.points(
        "gen_ai.server.request.duration", gen_ai__request__model="auto", gen_ai__response__model="good"
    )
    assert "error.type" not in request.attributes
    assert receiver.points("gen_ai.server.time_to_first_token", gen_ai__response__model="good")
    assert receiver.points("gen_ai.server.time_per_output_token", gen_ai__response__model="good")
    assert receiver.units["gen_ai.client.token.usage"] == "{token}"
    assert receiver.units["gen_ai.server.request.duration"] == "s"


def test_what_metrics_shows_is_sent_under_the_same_names(observed: Observed) -> None:
    observed.ask()

    def value(line: str) -> float:
        text = httpx.get(f"{observed.proxy.url}/metrics", headers=ROOT_KEY, timeout=60).text
        return float(next(each for each in text.splitlines() if each.startswith(line)).rpartition(" ")[2])

    shown = value('uniroute_requests_total{ending="complete",model="fair",reason="scored"}')

    def sent() -> float:
        points = observed.receiver.points("uniroute_requests", model="fair", reason="scored", ending="complete")
        return points[0].number if points else 0.0

    assert wait_until(lambda: sent() == shown)
    assert observed.receiver.points("uniroute_model_ready", model="fair")[0].number == 1
    assert observed.receiver.points("uniroute_overhead_seconds")[0].count >= shown
    assert observed.receiver.points("uniroute_store_available")[0].number == 1


def test_a_client_can_make_no_series(observed: Observed) -> None:
    observed.traced(model="made-up-0")
    assert wait_until(lambda: counted(observed, "gen_ai.server.request.duration", gen_ai__request__model="_OTHER"))
    before = {
        (name, *sorted(p.attributes.items())) for name in _names(observed) for p in observed.receiver.metrics[name]
    }
    for number in range(1, 50):
        headers = {"x-uniroute-tags": f"made-up-{number}", "x-session-id": f"made-up-{number}"}
        observed.ask(model=f"made-up-{number}", headers=headers)
    total = counted(observed, "gen_ai.server.request.duration", gen_ai__request__model="_OTHER")
    assert wait_until(
        lambda: counted(observed, "gen_ai.server.request.duration", gen_ai__request__model="_OTHER") >= max(50, total),
        20,
    )
    after = {
        (name, *sorted(p.attributes.items())) for name in _names(observed) for p in observed.receiver.metrics[name]
    }
    assert after == before


def _names(observed: Observed) -> list[str]:
    return [name for name in observed.receiver.metrics if name.startswith("gen_ai.")]


def test_variables_choose_the_newest_names_content_deltas_headers_and_the_service(
    tmp_path: Path, embedder_cache: Path
) -> None:
    environ = {
        "OTEL_SEMCONV_STABILITY_OPT_IN": "http,gen_ai_latest_experimental",
        "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT": "true",
        "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "delta",
        "OTEL_EXPORTER_OTLP_HEADERS": "x-team=blue",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
        "OTEL_SERVICE_NAME": "router-of-the-team",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=staging,service.instance.id=one",
        "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT": "200",
    }
    with OTLPReceiver() as receiver, observed_proxy(tmp_path, embedder_cache, receiver, environ) as observed:
        usage = {"prompt_tokens": 50, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 30}}
        usage |= {"completion_tokens_details": {"reasoning_tokens": 4}, "total_tokens": 59}
        observed.fair.then(Step(usage=usage), Step(body=EMBEDDING))
        server, (attempt,), _ = observed.traced(reasoning_effort="low")
        httpx.post(f"{observed.proxy.url}/v1/embeddings", json={"model": "vectors", "input": "hi"}, timeout=60)
        assert wait_until(lambda: "gen_ai.client.embeddings.duration" in receiver.metrics)
        named = server.resource
        assert (named["service.name"], named["deployment.environment.name"]) == ("router-of-the-team", "staging")
        assert named["service.instance.id"] == "one"
        assert all(each["x-team"] == "blue" for each in receiver.headers)
        said = attempt.attributes
        assert json.loads(said["gen_ai.input.messages"]) == [
            {"role": "user", "parts": [{"type": "text", "content": "What is 2 + 2?"}]}
        ]
        (answer,) = json.loads(said["gen_ai.output.messages"])
        assert answer["parts"] == [{"type": "text", "content": "The fair answer."}]
        assert said["gen_ai.request.reasoning.level"] == "low"
        (spent,) = receiver.points("gen_ai.client.inference.usage.input_tokens")
        assert (spent.number, spent.attributes["gen_ai.token.modality"], spent.is_delta) == (50, "unknown", True)
        assert receiver.points("gen_ai.client.inference.usage.cache_read.input_tokens")[0].number == 30
        assert receiver.points("gen_ai.client.inference.usage.reasoning.output_tokens")[0].number == 4
        assert receiver.points("gen_ai.client.inference.operation.output_tokens")[0].number == 9
        assert receiver.points("gen_ai.client.inference.duration")[0].count == 1
        assert receiver.points("gen_ai.client.embeddings.operation.input_tokens")[0].number == 7
        assert not {"gen_ai.client.token.usage", "gen_ai.client.operation.duration"} & set(receiver.metrics)
        # The receiver adds deltas up: a later export brings nothing twice.
        before = receiver.requests
        assert wait_until(lambda: receiver.requests > before + 2)
        assert receiver.points("gen_ai.client.inference.usage.input_tokens")[0].number == 50


@pytest.mark.slow
def test_nothing_is_sampled_where_the_sampler_says_so_and_metrics_are_sent(
    tmp_path: Path, embedder_cache: Path
) -> None:
    environ = {"OTEL_TRACES_SAMPLER": "parentbased_always_off"}
    with OTLPReceiver() as receiver, observed_proxy(tmp_path, embedder_cache, receiver, environ) as observed:
        observed.ask()
        parent = f"00-{'ab' * 16}-{'cd' * 8}-01"
        request_id, _ = observed.ask(headers={"traceparent": parent})  # which its caller has sampled
        receiver.wait_for_trace(request_id)
        assert {span.trace_id for span in receiver.spans} == {"ab" * 16}
        assert wait_until(lambda: counted(observed, "gen_ai.server.request.duration") == 2)


def test_a_request_of_a_key_names_its_key_and_one_without_is_an_unauthorized_span(
    tmp_path: Path, embedder_cache: Path
) -> None:
    with OTLPReceiver() as receiver, observed_proxy(tmp_path, embedder_cache, receiver, log_prompts=True) as observed:
        made = observed.proxy.admin("POST", "/admin/keys", {"name": "team"}).json()
        server, (attempt,), _ = observed.traced(headers={"authorization": f"Bearer {made['key']}"})
        refused, attempts, reply = observed.traced()
        assert reply.status == refused.attributes["http.response.status_code"] == 401
        assert attempts == []
        assert server.attributes["uniroute.key.id"] == made["id"]
        assert "What is 2 + 2?" in attempt.attributes["gen_ai.input.messages"]  # log_prompts
        everything = json.dumps([dict(span.attributes) for span in receiver.spans])
        assert made["key"] not in everything
        assert "sk-x" not in everything


@pytest.mark.parametrize("failing", ["hangs", "refuses", pytest.param("is not there", marks=pytest.mark.slow)])
def test_a_collector_that_takes_nothing_changes_nothing_for_clients(
    tmp_path: Path, embedder_cache: Path, failing: str
) -> None:
    """With a queue of ten spans, and forty requests."""
    environ = {
        "OTEL_BSP_MAX_QUEUE_SIZE": "10",
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "5",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "0.3",
    }
    if failing == "is not there":
        environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:9"
    with OTLPReceiver(hangs=failing == "hangs", status=400) as receiver:
        with observed_proxy(tmp_path, embedder_cache, receiver, environ) as observed:
            assert {observed.ask(stream=bool(number % 2))[1].text for number in range(40)} == {"The fair answer."}
            assert failing == "is not there" or receiver.requests > 0
            assert observed.proxy.stop() == 0
            log = observed.proxy.log
        assert receiver.spans == []
        if failing == "refuses":
            assert log.count("the OpenTelemetry collector does not take traces") == 1
        assert "Traceback" not in log


@pytest.mark.slow
def test_what_is_left_is_sent_when_the_server_ends_and_each_worker_sends_its_own(
    tmp_path: Path, embedder_cache: Path
) -> None:
    later = {"OTEL_BSP_SCHEDULE_DELAY": "3600000", "OTEL_METRIC_EXPORT_INTERVAL": "3600000"}
    with OTLPReceiver() as receiver, ScriptedUpstream() as upstream:
        (tmp_path / "config.yaml").write_text(
            json.dumps(
                {"model_list": [model_entry("small", upstream.url)], "uniroute": {"profile": {"on_start": False}}}
            )
        )
        environ = environment(tmp_path / "data", embedder_cache, MODEL_API_KEY="x")
        environ |= {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, **later}
        command = ("--config", tmp_path / "config.yaml", "--workers", "2")
        with ServeCommand(*command, environ=environ, log=tmp_path / "log.txt") as server:
            logged = "traces and metrics are sent to the OpenTelemetry collector"
            assert wait_until(lambda: server.log.count(logged) == 2, 60)
            for _ in range(20):  # each on a connection of its own, which either worker takes
                httpx.post(f"{server.url}/v1/chat/completions", json={**CHAT, "model": "small"}, timeout=60)
            assert receiver.spans == []
            assert server.stop() == 0
        pids = {point.resource["process.pid"] for point in receiver.metrics["uniroute_build_info"]}
        instances = {point.resource["service.instance.id"] for point in receiver.metrics["uniroute_build_info"]}
        assert (len(pids), len(instances)) == (2, 2)
        assert len(receiver.spans) == 40
        assert sum(point.number for point in receiver.metrics["uniroute_requests"]) == 20


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_SDK_DISABLED": "true"}, False),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318",
                "OTEL_TRACES_EXPORTER": "none",
                "OTEL_METRICS_EXPORTER": "none",
            },
            False,
        ),
    ],
)
def test_the_environment_says_whether_anything_is_sent(environ: dict[str, str], expected: bool) -> None:
    assert is_enabled(environ) is expected


async def test_without_a_collector_nothing_is_opened_and_nothing_stands_around_the_endpoints() -> None:
    """That nothing of it is imported then, tests/test_house.py says."""
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    async with open_telemetry(Settings(), {}, Metrics()) as tracing:
        assert tracing is None
    apps: list[Any] = [from_settings(Settings(), each) for each in ({}, environ)]
    assert [type(app.serve_exchange.__self__) for app in apps] == [ModelEndpoints, TracedEndpoints]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "pip install 'uniroute[otel]'"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL must be http/protobuf; got 'grpc'"),
        ({"OTEL_METRIC_EXPORT_INTERVAL": "soon"}, "OTEL_METRIC_EXPORT_INTERVAL must be milliseconds"),
    ],
)
async def test_what_cannot_be_opened_is_logged_and_fails_no_start(
    more: dict[str, str], said: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not more:
        monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)  # as where it is not installed
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", **more}
    async with open_telemetry(Settings(), environ, Metrics()) as tracing:
        assert tracing is None
    assert said in caplog.text
