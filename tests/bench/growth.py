"""Measure how cost grows, and what each way to ask costs beside the plain one: `python -m tests.bench.growth`.

Over models, clusters, sizes of bodies and open streams; with a key that has limits, with a session, with tools; in each
API; over TLS to the model; and while Redis hangs. The rows of a part take turns in short rounds, so that what the
machine does meanwhile hits all alike: each ratio is the median of those to the part's first row of the same round.
Where a figure grew faster than its cause, it is named. The server has one core, load and upstream another. It ends
within a quarter of an hour, with --quick within three minutes. Linux, two cores.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import redis

from proxy.cli import console
from proxy.concurrency import raise_open_files_limit
from proxy.storage.valkey import socket_path
from router_core.embedding import static_embedder
from tests.bench.open_streams import FORMS, with_open_streams
from tests.bench.overhead.__main__ import two_cores
from tests.bench.overhead.bodies import NUMBER, LoadAPI
from tests.bench.overhead.compiled import UPSTREAM, Upstream, program
from tests.bench.overhead.contenders import Server, ours, profiled
from tests.bench.overhead.processes import memory
from tests.bench.overhead.results import median
from tests.bench.overhead.rounds import Bench, Case, Row
from tests.bench.overhead.upstream import embeddings, write_answers
from tests.bench.prompts import write_prompts
from tests.conftest import CACHE
from tests.support.command import ADMIN_KEY, environment, run_command
from tests.support.tls import a_certificate
from tests.support.valkey import frozen

# Way to ask → the model that is requested.
WAYS = {"routed": "auto", "named": "model-0"}
BARE_APIS: Sequence[LoadAPI] = ("chat", "responses", "messages", "completions")
# Times its cause that a figure may grow before it is said to grow faster.
NOISE = 1.25
# Rounds that a row has at least, however late it is; the first warms up.
FEWEST_ROUNDS = 2
# Answers on each of sixteen connections that a round lasts for at least.
TURNS = 1


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    models: Sequence[int] = (2, 20, 200, 1_000)
    clusters: Sequence[int] = (16, 64, 256, 1_024)
    bodies: Sequence[int] = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
    streams: Sequence[int] = (1, 10, 100, 1_000, 2_000)
    prompts: int = 20_000
    """Generated, that maps are fitted on."""
    rounds: int = 5
    seconds: float = 0.6
    """Of a round."""
    limit_s: float = 840.0
    """After which no row has more rounds than it must."""


QUICK = Extent((2, 200), (16, 1_024), (1_000, 100_000, 1_000_000), (1, 1_000), 5_000, 3, 0.3, 120.0)


@dataclass(frozen=True)
class Figure:
    title: str
    form: str
    less_is_better: bool = True


OF_REQUESTS = (
    Figure("CPU µs a request", ",.0f"),
    Figure("requests/s at 16", ",.0f", less_is_better=False),
)
OF_STREAMS = tuple(
    Figure(title, form, less_is_better=title != "requests/s beside at 16") for title, form in FORMS.items()
)


@dataclass(frozen=True)
class Point:
    """Hold one row. `cause` is the number that grows; it is the same in two rows where nothing should change."""

    name: str
    cause: float
    values: Mapping[str, float]
    way: str = ""
    """Rows of other ways are not compared with this one."""
    ratios: Mapping[str, float] = field(default_factory=dict)
    """To the first row of the same way."""


@dataclass(frozen=True)
class Variant:
    """One row that takes turns with the others of its part."""

    name: str
    way: str
    row: Row
    kind: str = "mixed"
    stream: bool = False
    cause: float = 1.0


@dataclass
class Growing:
    bench: Bench
    table: Path
    extent: Extent
    until: float
    """Monotonic seconds."""
    failed: int = 0
    reasons: set[str] = field(default_factory=set)

    @contextmanager
    def served(self, name: str, upstream: Upstream | None = None, **config: Any) -> Iterator[Callable[..., Row]]:
        """Start a server; yield what makes a row of it: of a name and, if it is not the default, a way and more."""
        folder = self.bench.folder / name.replace(" ", "-")
        server = ours(folder, (upstream or self.bench.upstream).url, WAYS, embedder_cache=self.table, **config)
        with self.running(name, server) as row:
            yield row

    @contextmanager
    def running(self, name: str, server: Server) -> Iterator[Callable[..., Row]]:
        console.echo_err(f"starting {name}")
        with profiled(server, self.bench.cores.gateway) as started:
            pid = started.process.pid

            def row(way: str, name: str = name, **more: Any) -> Row:
                return Row(f"{name} {way}", WAYS[way], server.port, pid, **more)

            yield row

    def measure(self, variants: Sequence[Variant]) -> list[Point]:
        """Let the variants take turns, forwards and backwards, and return their medians."""
        found: list[dict[str, list[float]]] = [{figure.title: [] for figure in OF_REQUESTS} for _ in variants]
        lasting = [self.bench.seconds] * len(variants)
        for number in range(self.extent.rounds):
            if number >= FEWEST_ROUNDS and time.monotonic() > self.until:
                break
            console.echo_err(f"round {number + 1} of {self.extent.rounds}")
            order = range(len(variants))
            for at in order if number % 2 else reversed(order):
                figures = self._once(variants[at], lasting[at])
                lasting[at] = max(lasting[at], TURNS * figures["p50_ms"] * 1e-3)
                if number:  # the first warms up
                    found[at][OF_REQUESTS[0].title].append(1000 * figures["cpu_ms"])
                    found[at][OF_REQUESTS[1].title].append(figures["per_s"])
        first: dict[str, int] = {}
        for at, variant in enumerate(variants):
            first.setdefault(variant.way, at)
        return [
            Point(
                variant.name,
                variant.cause,
                {title: median(values) for title, values in found[at].items()},
                variant.way,
                {title: _median_ratio(values, found[first[variant.way]][title]) for title, values in found[at].items()},
            )
            for at, variant in enumerate(variants)
        ]

    def _once(self, variant: Variant, seconds: float) -> Mapping[str, float]:
        outcome = self.bench.measure(Case("", variant.kind, variant.stream), variant.row, seconds=seconds)
        self.failed += outcome.failed
        if outcome.failed:
            self.reasons.add(f"{variant.name}, {variant.way}: {outcome.why}")
        return outcome.figures


def _median_ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """Return the median of the ratios round by round."""
    return median([value / of_base if of_base else math.nan for value, of_base in zip(values, base, strict=True)])


def over_models(growing: Growing) -> list[Point]:
    variants = []
    with ExitStack() as stack:
        for count in growing.extent.models:
            row = stack.enter_context(growing.served(f"{count} models", models=count))
            # One that is named is chosen from nothing.
            causes = {"routed": count, "named": 1}
            variants += [Variant(f"{count:,} models", way, row(way), cause=causes[way]) for way in WAYS]
        return growing.measure(variants)


def over_clusters(growing: Growing) -> list[Point]:
    folder, variants = growing.bench.folder, []
    write_prompts(folder / "prompts.jsonl", growing.extent.prompts)
    environ = environment(folder / "fitting", growing.table)
    with ExitStack() as stack:
        for count in growing.extent.clusters:
            console.echo_err(f"fitting {count} clusters")
            fitted = folder / f"map-{count}"
            arguments = ("--out", fitted, "--clusters", str(count))
            done = run_command("fit", folder / "prompts.jsonl", *arguments, environ=environ, timeout_s=300)
            if done.returncode:
                raise SystemExit(done.stderr)
            row = stack.enter_context(growing.served(f"{count} clusters", cluster_map=fitted))
            variants.append(Variant(f"K = {count:,}", "routed", row("routed"), cause=count))
        return growing.measure(variants)


def over_bodies(growing: Growing) -> list[Point]:
    sizes = growing.extent.bodies
    with growing.served("bodies", max_body_bytes=4 * max(sizes)) as row:
        rows = {way: row(way) for way in WAYS}
        return growing.measure(
            [
                Variant(f"{size:,} characters", way, rows[way], str(size), cause=size)
                for size, way in product(sizes, WAYS)
            ]
        )


def over_ways(growing: Growing) -> list[Point]:
    """Compare requests with a key that has limits, of sessions and with tools with those of a key alone."""
    with growing.served("ways") as row:
        # Two models and a store are as much as each of them has.
        port = row("routed").port
        plain, limited = _key(port, {}), _key(port, LIMITS)
        variants = []
        for way in WAYS:
            with_key = {"authorization": f"Bearer {plain}"}
            rows = {
                "plain": (row(way, "plain", headers=with_key), "mixed"),
                "a limited key": (row(way, "limited", headers={"authorization": f"Bearer {limited}"}), "mixed"),
                "a session": (row(way, "session", headers={**with_key, "x-session-id": f"session-{NUMBER}"}), "mixed"),
                "eight tools": (row(way, "tools", headers=with_key), "tools"),
                "an agent's 60 turns": (row(way, "agent", headers=with_key), "agent"),
            }
            variants += [Variant(name, way, each, kind) for name, (each, kind) in rows.items()]
        return growing.measure(variants)


# More than a round uses.
LIMITS = {"requests_per_minute": 10**6, "tokens_per_minute": 10**9, "usd_per_day": 10**6, "usd_per_month": 10**6}


def _key(port: int, limits: Mapping[str, int]) -> str:
    """Create a key, and return its secret."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {"authorization": f"Bearer {ADMIN_KEY}", "content-type": "application/json"}
    connection.request("POST", "/admin/keys", json.dumps({"name": "bench", **limits}), headers)
    document = json.loads(connection.getresponse().read())
    connection.close()
    return str(document["key"])


def over_apis(growing: Growing) -> list[Point]:
    folder, core = growing.bench.folder, growing.bench.cores.load
    answers = write_answers(folder / "vectors", embeddings())
    with (
        Upstream(folder, core, answers=answers) as vectors,
        growing.served("apis") as row,
        growing.running("embeddings", _embedding_server(growing, vectors)) as embedding_row,
    ):
        variants = [
            Variant(api, f"{way}, streamed" if stream else way, row(way, api, api=api), stream=stream)
            for stream, way, api in product((False, True), WAYS, BARE_APIS)
        ]
        variants.append(Variant("embeddings", "named", embedding_row("named", api="embeddings")))
        return growing.measure(variants)


def _embedding_server(growing: Growing, upstream: Upstream) -> Server:
    folder, info = growing.bench.folder / "embeddings", {"mode": "embedding", "output_cost_per_token": 0.0}
    server = ours(folder, upstream.url, WAYS, embedder_cache=growing.table, info=info)
    return replace(server, profiles={})


def over_tls(growing: Growing) -> list[Point]:
    """Compare an upstream over TLS, whose authority is its own, with a plain one: the same program."""
    folder, core = growing.bench.folder, growing.bench.cores.load
    certificate, python = a_certificate(folder), program(UPSTREAM, compiler=None)
    variants = []
    with (
        Upstream(folder, core, python) as plain,
        Upstream(folder, core, python, certificate=certificate) as secured,
        ExitStack() as stack,
    ):
        for name, upstream in (("plain", plain), ("TLS", secured)):
            server = ours(folder / f"to {name}", upstream.url, WAYS, embedder_cache=growing.table)
            trusting = replace(server, environ={**(server.environ or {}), "SSL_CERT_FILE": str(certificate)})
            row = stack.enter_context(growing.running(name, trusting))
            variants += [
                Variant(name, f"{way}, streamed" if stream else way, row(way), stream=stream)
                for stream, way in product((False, True), WAYS)
            ]
        return growing.measure(variants)


def without_redis(growing: Growing) -> list[Point]:
    """Stop the embedded store as a process that hangs is stopped: the worst way to be away."""
    with growing.served("store") as row:
        rows = [Variant("the store answers", way, row(way)) for way in WAYS]
        before = growing.measure(rows)
        with frozen(_store_pid(growing.bench.folder / "store" / "data")):
            after = growing.measure([replace(each, name="the store hangs") for each in rows])
    ratios = [
        {title: value / first.values[title] for title, value in point.values.items()}
        for first, point in zip(before, after, strict=True)
    ]
    return [*before, *(replace(point, ratios=each) for point, each in zip(after, ratios, strict=True))]


def _store_pid(data_dir: Path) -> int:
    with redis.Redis(unix_socket_path=str(socket_path(data_dir / "valkey"))) as client:
        info: Any = client.info("server")
    return int(info["process_id"])


def over_streams(growing: Growing) -> list[Point]:
    points: list[Point] = []
    with growing.served("streams") as make_row:
        row = make_row("routed")
        growing.measure([Variant("warming up", "routed", row)])
        alone = memory(row.pid).pss
        for count in growing.extent.streams:
            console.echo_err(f"{count} open streams")
            seen = with_open_streams(growing.bench, row, count, alone)
            growing.failed += seen.failed
            first = points[0].values if points else seen.figures
            ratios = {title: value / first[title] for title, value in seen.figures.items() if first[title]}
            points.append(Point(f"{seen.open:,} open streams", seen.open, seen.figures, ratios=ratios))
    return points


Part = tuple[Callable[[Growing], list[Point]], Sequence[Figure]]
WORK: Mapping[str, Part] = {
    "models": (over_models, OF_REQUESTS),
    "clusters": (over_clusters, OF_REQUESTS),
    "bodies": (over_bodies, OF_REQUESTS),
    "ways": (over_ways, OF_REQUESTS),
    "apis": (over_apis, OF_REQUESTS),
    "tls": (over_tls, OF_REQUESTS),
    "redis": (without_redis, OF_REQUESTS),
    "streams": (over_streams, OF_STREAMS),
}


def growth(before: Point, after: Point, figure: Figure) -> float:
    """Return the factor by which a cost rose; for a rate, by which it fell."""
    then, now = before.values[figure.title], after.values[figure.title]
    if math.isnan(then) or math.isnan(now) or min(then, now) <= 0:
        return math.nan
    return now / then if figure.less_is_better else then / now


def too_fast(before: Point, after: Point, figures: Sequence[Figure]) -> list[str]:
    """Return the titles of figures that grew faster than their cause."""
    allowed = NOISE * after.cause / before.cause
    return [figure.title for figure in figures if growth(before, after, figure) > allowed]


# Parts whose rows are steps of a growth, and not different things.
STEPS = frozenset({"models", "clusters", "bodies", "streams"})


def print_part(name: str, points: Sequence[Point], figures: Sequence[Figure]) -> list[str]:
    """Print a part, way by way, and return what grew too fast."""
    rows, found = [], []
    for way in dict.fromkeys(point.way for point in points):
        before: Point | None = None
        for point in (point for point in points if point.way == way):
            flagged = too_fast(before, point, figures) if before and name in STEPS else []
            label = f"{point.name}, {way}" if way else point.name
            found += [f"{label}: {title} grew faster than its cause" for title in flagged]
            rows.append((label, *(_cell(point, figure) for figure in figures), ", ".join(flagged)))
            before = point
    console.table((name, *(figure.title for figure in figures), "faster than its cause"), rows, title="")
    console.echo("")
    return found


def _cell(point: Point, figure: Figure) -> str:
    ratio = point.ratios.get(figure.title, math.nan)
    value = f"{point.values[figure.title]:{figure.form}}"
    return value if math.isnan(ratio) else f"×{ratio:.2f}  {value}"


def main() -> None:
    arguments = _arguments()
    extent, began = QUICK if arguments.quick else Extent(), time.monotonic()
    raise_open_files_limit()
    static_embedder(arguments.table, console.echo_err)
    found: list[str] = []
    with tempfile.TemporaryDirectory(prefix="uniroute-growth-") as name:
        cores = two_cores()
        with Upstream(Path(name), cores.load) as upstream:
            bench = Bench(Path(name), cores, upstream, extent.seconds)
            growing = Growing(bench, arguments.table, extent, began + extent.limit_s)
            for part in arguments.parts.split(","):
                work, figures = WORK[part]
                found += print_part(part, work(growing), figures)
                console.echo_err(f"{time.monotonic() - began:.0f} s")
    for line in found:
        console.echo(f"GROWS: {line}")
    for line in sorted(growing.reasons):
        console.echo(f"FAILED: {line}")
    sys.exit(1 if growing.failed else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(WORK), help=f"comma-separated: {', '.join(WORK)}")
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds, three minutes")
    parser.add_argument("--table", type=Path, default=CACHE, help="where the embedding table is, or is made")
    arguments = parser.parse_args()
    arguments.table = arguments.table.absolute()
    if unknown := [part for part in arguments.parts.split(",") if part not in WORK]:
        raise SystemExit(f"--parts: there is no {unknown[0]!r}; there are {', '.join(WORK)}")
    return arguments


if __name__ == "__main__":
    main()
