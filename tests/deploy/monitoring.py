"""Read what deploy/monitoring asks of Prometheus: queries of the dashboard, alerts, and the names in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from proxy.server.metrics import Description, HealthCollector, Metrics, ModelCollector, Values, worker_deaths
from proxy.server.quality_watch import QualityWatch
from proxy.settings.schema import CircuitBreakerSettings
from proxy.upstream.concurrency_limit import ConcurrencyLimiter
from proxy.upstream.health import HealthRegistry
from tests.test_house import ROOT

MONITORING = ROOT / "deploy" / "monitoring"
DASHBOARD = MONITORING / "grafana" / "dashboards" / "uniroute.json"
ALERTS = MONITORING / "alerts.yml"
CONFIG = MONITORING / "prometheus.yml"

# What Grafana fills in.
VARIABLES = {"$__rate_interval": "1m", "$__range": "1h", "$instance": ".*", "$model": ".*"}
# What Prometheus adds to each series, and what it tells of each target.
ADDED_LABELS = {"instance", "job"}
OF_PROMETHEUS = {"up": frozenset[str]()}
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}

_KEYWORDS = frozenset("by without and or unless on ignoring offset group_left group_right bool".split())
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")
_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*\{([^}]*)\}")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_DURATION = re.compile(r"\[[^\]]*\]|\boffset\s+\w+")


@dataclass(frozen=True)
class Query:
    title: str
    expr: str

    @property
    def filled(self) -> str:
        text = self.expr
        for name, value in VARIABLES.items():
            text = text.replace(name, value)
        return text

    @property
    def plain(self) -> str:
        return _DURATION.sub("", _STRING.sub('""', self.filled))

    def selectors(self) -> Iterator[tuple[str, set[str]]]:
        """Yield each metric with the labels that it is selected by."""
        for name, inside in _SELECTOR.findall(self.plain):
            yield name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inside))

    def groupings(self) -> set[str]:
        listed = ",".join(_GROUPING.findall(self.plain))
        return {name.strip() for name in listed.split(",") if name.strip()}

    def metrics(self) -> set[str]:
        """Return every name that is no function, keyword or label."""
        text = re.sub(r"\{[^}]*\}", "", _GROUPING.sub("", self.plain))
        names = re.findall(r"\b[a-zA-Z_:][\w:]*\b(?!\s*\()", text)
        return {name for name in names if name not in _KEYWORDS and not re.fullmatch(r"\d.*|e\d+", name)}


@cache
def dashboard() -> dict[str, Any]:
    return dict(json.loads(DASHBOARD.read_text("utf-8")))


@cache
def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> list[Query]:
    shown = [Query(p["title"], t["expr"]) for p in dashboard()["panels"] for t in p.get("targets", ())]
    return [*shown, *(Query(rule["alert"], rule["expr"]) for rule in alerts())]


@cache
def described() -> tuple[Description, ...]:
    """Return everything that /metrics shows, by name."""
    metrics = Metrics()
    metrics.register(HealthCollector(HealthRegistry(CircuitBreakerSettings()), list))
    metrics.register(ModelCollector(lambda: None, ConcurrencyLimiter()))  # type: ignore[arg-type,return-value]
    metrics.register(QualityWatch(None, None, Values()))  # type: ignore[arg-type]
    found = [each.description for each in (*metrics.every, worker_deaths(Values()))]
    return tuple(sorted(found, key=lambda each: each.name))


@cache
def labels_of_metrics() -> dict[str, frozenset[str]]:
    """Return the labels of everything that /metrics may show, by the names of its series."""
    found = dict(OF_PROMETHEUS)
    for each in described():
        for suffix in SUFFIXES[each.kind]:
            bucket = {"le"} if suffix == "_bucket" else set()
            found[f"{each.name}{suffix}"] = frozenset({*each.labels, *bucket})
    return found
