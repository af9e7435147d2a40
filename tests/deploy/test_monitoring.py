from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.deploy.monitoring import (
    ADDED_LABELS,
    ALERTS,
    CONFIG,
    MONITORING,
    OF_PROMETHEUS,
    alerts,
    dashboard,
    labels_of_metrics,
    queries,
)
from tests.support.ports import free_port
from tests.support.proxy_process import ProxyProcess, model_entry
from tests.support.scripted_answers import Step
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until
from tests.test_docs import anchors
from tests.test_house import ROOT

NEEDS_PROMETHEUS = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="Prometheus is not installed: apt-get install prometheus",
)


def test_every_metric_and_label_that_is_asked_for_is_one_of_ours() -> None:
    known = labels_of_metrics()
    for query in queries():
        named = query.metrics()
        assert named, query
        assert named - known.keys() == set(), query
        for metric, labels in query.selectors():
            assert labels - known[metric] - ADDED_LABELS == set(), query
        allowed = set().union(*(known[name] for name in named))
        assert query.groupings() - allowed - ADDED_LABELS == set(), query


@pytest.mark.parametrize(
    "expr", ["sum by (x) (uniroute_degraded_total)", "uniroute_tokens_total{x=~'y'}", "uniroute_x"]
)
def test_the_check_notices_what_is_wrong(expr: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.deploy import test_monitoring
    from tests.deploy.monitoring import Query

    monkeypatch.setattr(test_monitoring, "queries", lambda: [Query("wrong", expr)])
    with pytest.raises(AssertionError, match="wrong"):
        test_every_metric_and_label_that_is_asked_for_is_one_of_ours()


def test_every_metric_is_shown_on_the_dashboard_or_has_an_alert() -> None:
    asked = {name for query in queries() for name in query.metrics()}
    families = {name.removesuffix("_sum").removesuffix("_count") for name in labels_of_metrics()}
    shown = {name.removesuffix("_bucket") for name in asked}
    unseen = {name for name in families if not name.endswith("_bucket")} - shown - set(OF_PROMETHEUS)
    # Of these the number says nothing by itself.
    assert unseen == {"uniroute_state_version"} | {"uniroute_build_info"}


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_every_alert_says_what_is_wrong_and_where_the_remedy_is(rule: dict[str, Any]) -> None:
    path, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert rule["annotations"]["summary"].endswith(".")
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert anchor == rule["alert"].lower()
    assert anchor in anchors(ROOT / path)


def test_the_dashboard_can_be_provisioned() -> None:
    shown = dashboard()
    panels = [panel for panel in shown["panels"] if panel["type"] != "row"]
    assert (shown["uid"], shown["title"]) == ("uniroute", "UniRoute")
    assert len({panel["id"] for panel in shown["panels"]}) == len(shown["panels"])
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels)
    places = [
        (cell["x"] + dx, cell["y"] + dy) for cell in (p["gridPos"] for p in shown["panels"]) for dx, dy in _cells(cell)
    ]
    assert len(places) == len(set(places)), "panels cover each other"
    provider = yaml.safe_load((MONITORING / "grafana/provisioning/dashboards/uniroute.yaml").read_text("utf-8"))
    source = yaml.safe_load((MONITORING / "grafana/provisioning/datasources/prometheus.yaml").read_text("utf-8"))
    assert provider["providers"][0]["options"]["path"] == "/etc/grafana/dashboards"
    assert source["datasources"][0]["type"] == "prometheus"


def _cells(cell: dict[str, int]) -> Iterator[tuple[int, int]]:
    assert cell["x"] + cell["w"] <= 24
    return ((dx, dy) for dx in range(cell["w"]) for dy in range(cell["h"]))


# Each minute's value of each series, as promtool writes them.
SERIES = {
    'up{job="uniroute",instance="a"}': "0x30",
    'uniroute_store_available{instance="a"}': "0x30",
    'uniroute_model_ready{instance="a",model="m"}': "0x30",
    'uniroute_model_paused{instance="a",model="m"}': "0x30",
    'uniroute_model_ready{instance="a",model="paused"}': "1x30",
    'uniroute_model_paused{instance="a",model="paused"}': "1x30",
    'uniroute_tasks{instance="a"}': "20x30",
    'uniroute_worker_deaths_total{instance="a",cause="SIGKILL"}': "_x14 1x15",
    'uniroute_requests_total{model="m",reason="scored",ending="complete"}': "0+90x30",
    'uniroute_requests_total{model="m",reason="scored",ending="failed"}': "0+10x30",
    'uniroute_upstream_attempts_total{model="m"}': "0+100x30",
    'uniroute_upstream_failures_total{model="m",status="500"}': "0+30x30",
    'uniroute_usage_dropped_total{instance="a"}': "0x10 5x20",
}
# Minute, alert, labels, and what it says; None: it does not fire.
EXPECTED: list[tuple[int, str, dict[str, str], str | None]] = [
    (15, "UniRouteDown", {"job": "uniroute", "instance": "a"}, "a does not answer."),
    (
        *(15, "UniRouteNoModelReady", {"instance": "a"}),
        "a has no model with a profile and a price that is not paused.",
    ),
    (15, "UniRouteRequestsFail", {}, "10% of the requests fail."),
    (25, "UniRouteModelFails", {"model": "m"}, "m fails 30% of its attempts."),
    (13, "UniRouteWorkerDied", {}, None),
    (16, "UniRouteWorkerDied", {"instance": "a"}, "1 workers of a died within ten minutes."),
    (29, "UniRouteWorkerDied", {}, None),
    (9, "UniRouteUsageDropped", {}, None),
    (
        *(15, "UniRouteUsageDropped", {"instance": "a"}),
        "a has dropped usage records: sums and budgets are too low.",
    ),
    (1, "UniRouteStoreAway", {}, None),
    (
        *(15, "UniRouteStoreAway", {"instance": "a"}),
        "a has had no Redis for two minutes; changes are refused and usage waits.",
    ),
    (15, "UniRouteSlow", {}, None),
]


@NEEDS_PROMETHEUS
@pytest.mark.slow
def test_alerts_fire_when_they_should_and_not_before(tmp_path: Path) -> None:
    for what, path in (("rules", ALERTS), ("config", CONFIG)):
        _promtool("check", what, *(["--syntax-only"] if what == "config" else []), str(path))
    rules = {rule["alert"]: rule for rule in alerts()}
    cases: list[dict[str, Any]] = []
    for minute, name, labels, says in EXPECTED:
        told = {"summary": says, "runbook_url": rules[name]["annotations"]["runbook_url"]}
        fires = {"exp_labels": {**labels, **rules[name]["labels"]}, "exp_annotations": told}
        cases.append({"eval_time": f"{minute}m", "alertname": name, "exp_alerts": [] if says is None else [fires]})
    series = [{"series": name, "values": values} for name, values in SERIES.items()]
    test = {"interval": "1m", "input_series": series, "alert_rule_test": cases}
    (tmp_path / "firing.yml").write_text(yaml.safe_dump({"rule_files": [str(ALERTS)], "tests": [test]}))
    _promtool("test", "rules", str(tmp_path / "firing.yml"))


def _promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@dataclass(frozen=True)
class Prometheus:
    url: str

    def get(self, path: str, **params: str) -> Any:
        reply = httpx.get(f"{self.url}/api/v1/{path}", params=params, timeout=60).json()
        assert reply["status"] == "success", (params, reply)
        assert not reply.get("warnings"), (params, reply)
        return reply["data"]

    def value(self, query: str) -> float:
        found = self.get("query", query=query)["result"]
        return float(found[0]["value"][1]) if found else 0.0


@pytest.fixture
def scraped(tmp_path: Path, embedder_cache: Path) -> Iterator[tuple[ProxyProcess, ScriptedUpstream, Prometheus]]:
    """Run the real program with the real configuration, but for addresses, paths and intervals."""
    with ScriptedUpstream() as upstream:
        models = [model_entry("fair", upstream.url, price=1e-7), model_entry("good", upstream.url, price=1e-5)]
        config = {"model_list": models, "uniroute": {"profile": {"on_start": False}}}
        with ProxyProcess(tmp_path / "proxy", embedder_cache, config, {"MODEL_API_KEY": "sk-x"}) as proxy:
            proxy.put_profile("fair", 0.3)
            proxy.put_profile("good", 0.1)
            made = proxy.admin("POST", "/admin/keys", {"name": "prometheus", "role": "viewer"}).json()
            (tmp_path / "viewer_key").write_text(made["key"])
            text = CONFIG.read_text("utf-8").replace("15s", "1s").replace("/run/secrets/", f"{tmp_path}/")
            text = text.replace('"proxy-a:8000", "proxy-b:8000"', f'"{proxy.url.removeprefix("http://")}"')
            (tmp_path / "prometheus.yml").write_text(text)
            shutil.copy(ALERTS, tmp_path / "alerts.yml")
            port = free_port()
            command = [
                *("prometheus", f"--config.file={tmp_path / 'prometheus.yml'}"),
                *(f"--storage.tsdb.path={tmp_path / 'data'}", f"--web.listen-address=127.0.0.1:{port}"),
            ]
            with (tmp_path / "prometheus.log").open("wb") as log, subprocess.Popen(command, stderr=log) as process:
                try:
                    yield proxy, upstream, Prometheus(f"http://127.0.0.1:{port}")
                finally:
                    process.terminate()


def _is_up(prometheus: Prometheus) -> bool:
    try:
        ready = httpx.get(f"{prometheus.url}/-/ready", timeout=60).is_success
        return ready and prometheus.value("sum(up)") == 1
    except httpx.TransportError:
        return False


@NEEDS_PROMETHEUS
@pytest.mark.slow
def test_a_real_prometheus_scrapes_a_real_server_and_evaluates_every_query_and_rule(
    scraped: tuple[ProxyProcess, ScriptedUpstream, Prometheus],
) -> None:
    proxy, upstream, prometheus = scraped
    key = proxy.admin("POST", "/admin/keys", {"name": "team", "requests_per_minute": 12}).json()["key"]
    headers = {"authorization": f"Bearer {key}"}
    for number in range(16):  # of which the limit refuses some, and one falls back
        if number == 3:
            upstream.then(Step(status=500))
        body = {"model": "auto", "stream": bool(number % 2), "messages": [{"role": "user", "content": "hi"}]}
        httpx.post(f"{proxy.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert wait_until(lambda: _is_up(prometheus), 60)
    assert wait_until(lambda: prometheus.value("max(count_over_time(uniroute_tasks[1m]))") >= 3, 60)
    shown = {series["__name__"] for series in prometheus.get("series", **{"match[]": '{job="uniroute"}'})}
    for query in queries():
        result = prometheus.get("query", query=query.filled)["result"]
        is_alert = query.title.startswith("UniRoute")
        if query.metrics() <= shown and not is_alert and query.title != "Endings other than complete":
            assert result, query
    assert "uniroute_limited_total" in shown
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert [rule["name"] for rule in rules] == [rule["alert"] for rule in alerts()]

    def evaluated() -> bool:
        groups = prometheus.get("rules")["groups"]
        return all(rule["health"] == "ok" for group in groups for rule in group["rules"])

    assert wait_until(evaluated), prometheus.get("rules")
    firing = [
        rule["name"]
        for group in prometheus.get("rules")["groups"]
        for rule in group["rules"]
        if rule["state"] == "firing"
    ]
    assert firing == []
