"""Measure what the proxy costs on one core, beside others: `python -m tests.bench.overhead [--quick | --peers]`.

The gateway has one core to itself; the load and a cheap loopback upstream have another. Rounds are interleaved, so that
what the machine does meanwhile hits all alike: medians over rounds, in brackets the least and the most.
--quick: ours and the direct path, two minutes. Without: also FastAPI over litellm's SDK, which any gateway on it pays,
ten minutes. --peers: also LiteLLM's proxy and Portkey, installed on first use, twenty-five. Linux, two cores.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from proxy.cli import console
from router_core.embedding import static_embedder
from tests.bench.overhead import peers
from tests.bench.overhead.bodies import KINDS
from tests.bench.overhead.compiled import LOAD, UPSTREAM, Upstream, program
from tests.bench.overhead.contenders import (
    HAS_FORWARD_MODES,
    MESSAGES,
    PINNED,
    RESPONSES,
    ROUTED,
    TRANSLATED,
    Server,
    litellm_proxy,
    ours,
    portkey,
    sdk_floor,
)
from tests.bench.overhead.report import as_json, markdown, print_report
from tests.bench.overhead.rounds import Bench, Cores
from tests.bench.overhead.session import Plan, measured
from tests.conftest import CACHE

OTHERS = [kind for kind in KINDS if kind not in ("mixed", "tools")]
PEERS = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "uniroute-bench"


def main() -> None:
    arguments = _arguments()
    plan, began = _plan(arguments), time.monotonic()
    static_embedder(arguments.table, console.echo_err)
    with tempfile.TemporaryDirectory(prefix="uniroute-bench-") as name:
        folder, cores = Path(name), two_cores()
        with Upstream(folder, cores.load) as upstream:
            servers = _servers(arguments, folder, upstream.url)
            results = measured(plan, Bench(folder, cores, upstream, plan.seconds), servers)
    results.about |= _about(arguments, time.monotonic() - began)
    if arguments.json:
        console.emit_json(as_json(results))
    else:
        print_report(results, plan.kinds)
    if arguments.markdown:
        arguments.markdown.write_text(markdown(results), "utf-8")
    sys.exit(1 if results.failures() else 0)


def two_cores() -> Cores:
    if not hasattr(os, "sched_getaffinity"):
        raise SystemExit("the bench pins processes to cores, which only Linux does")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("the bench needs two cores: one for the gateway, one for load and upstream")
    return Cores(gateway=cores[0], load=cores[1])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ours and the direct path alone")
    parser.add_argument("--peers", action="store_true", help="also LiteLLM's proxy and Portkey")
    parser.add_argument("--peers-dir", type=Path, default=PEERS, help=f"where they are installed; {PEERS}")
    parser.add_argument("--rounds", type=int, help="3, or 2 with --quick")
    parser.add_argument("--seconds", type=float, help="of each round of each case; 1.5, or 1 with --quick")
    parser.add_argument("--kinds", help=f"of bodies, comma-separated, beside mixed: {', '.join(OTHERS)}")
    parser.add_argument("--requests", type=int, help="until memory is looked at again; 20,000, or 5,000 if --quick")
    parser.add_argument("--only", default="", help="comma-separated parts of names of rows")
    parser.add_argument("--json", action="store_true", help="every figure of every round, on stdout alone")
    parser.add_argument("--markdown", type=Path, help="also write the short table to this file")
    parser.add_argument("--table", type=Path, default=CACHE, help="where the embedding table is, or is made")
    arguments = parser.parse_args()
    arguments.table = arguments.table.absolute()
    return arguments


def _plan(arguments: argparse.Namespace) -> Plan:
    quick, kinds = arguments.quick, arguments.kinds
    usual = [] if quick else OTHERS
    plan = Plan(
        rounds=arguments.rounds or (2 if quick else 3),
        seconds=arguments.seconds or (1.0 if quick else 1.5),
        kinds=usual if kinds is None else [kind for kind in kinds.split(",") if kind],
        worked_requests=arguments.requests or (5_000 if quick else 20_000),
        worked_s=240.0 if arguments.peers else 90.0,
    )
    if unknown := [kind for kind in plan.kinds if kind not in KINDS]:
        raise SystemExit(f"--kinds: there is no {unknown[0]!r}; there are {', '.join(KINDS)}")
    return plan


def _servers(arguments: argparse.Namespace, folder: Path, url: str) -> Sequence[Server]:
    table = arguments.table
    rows = {ROUTED: "auto", PINNED: "model-0", MESSAGES: "auto", RESPONSES: "auto"}
    servers = [ours(folder / "ours", url, rows, embedder_cache=table)]
    if HAS_FORWARD_MODES:
        info = {"forward": "translate"}
        servers.append(ours(folder / "translated", url, {TRANSLATED: "auto"}, embedder_cache=table, info=info))
    if not arguments.quick:
        servers.append(sdk_floor(folder / "floor", url))
    if arguments.peers:
        servers.append(litellm_proxy(folder / "litellm", url, peers.litellm_program(arguments.peers_dir)))
        servers.append(portkey(folder / "portkey", url, peers.portkey_script(arguments.peers_dir)))
    parts = arguments.only.split(",")
    return [server for server in servers if any(part in row for part in parts for row in server.rows)]


def _about(arguments: argparse.Namespace, seconds: float) -> dict[str, object]:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "command": "python -m tests.bench.overhead " + " ".join(sys.argv[1:]),
        "cpu": models[0].partition(": ")[2] if models else "?",
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": "C" if len(program(LOAD)) == 1 else "Python",
        "upstream": "C" if len(program(UPSTREAM)) == 1 else "Python",
        "peers": peers.versions(arguments.peers_dir) if arguments.peers else {},
        "seconds": round(seconds),
    }


if __name__ == "__main__":
    main()
