from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pyarrow.parquet import read_table

from router_core.artifact import load_map
from router_core.evaluation.outcomes import parse_row, read_rows
from tests.server.conftest import Fleet, open_fleet
from tests.support.command import environment, run_command
from tests.support.proxy_process import ADMIN_KEY
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Fleet]:
    with open_fleet(tmp_path_factory.mktemp("decisions"), embedder_cache) as opened:
        body = {"messages": [{"role": "user", "content": "What is 2 + 2?"}]}
        for model in ("auto", "good", "fair"):
            sent = {"model": model, **body}
            reply = httpx.post(f"{opened.base_url}/chat/completions", json=sent, timeout=60)
            path = f"/admin/decisions/{reply.headers['x-uniroute-decision']}"
            assert wait_until(lambda path=path: opened.proxy.admin("GET", path).status_code == 200)
        yield opened


def decisions(fleet: Fleet, *arguments: str) -> str:
    environ = environment(fleet.proxy.folder / "cli", UNIROUTE_URL=fleet.url, UNIROUTE_ADMIN_KEY=ADMIN_KEY)
    ended = run_command("decisions", *arguments, environ=environ)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_decisions_are_listed_and_one_is_shown(fleet: Fleet) -> None:
    rows = json.loads(decisions(fleet, "list", "--json"))
    shown = json.loads(decisions(fleet, "show", rows[0]["id"]))

    assert [row["requested"] for row in rows] == ["fair", "good", "auto"]
    assert shown == rows[0]
    assert rows[1]["id"] in decisions(fleet, "list", "--model", "good", "--since", "1h")


def test_savings_are_reported_by_model_and_are_the_sum_of_the_decisions(fleet: Fleet) -> None:
    environ = environment(fleet.proxy.folder / "cli", UNIROUTE_URL=fleet.url, UNIROUTE_ADMIN_KEY=ADMIN_KEY)
    found = json.loads(run_command("report", "--json", environ=environ).stdout)
    shown = run_command("report", "--by", "model", "--since", "1h", environ=environ).stdout
    rows = json.loads(decisions(fleet, "list", "--json"))

    assert found["total"]["requests"] == len(rows) == 3
    assert found["total"]["cost_usd"] == pytest.approx(sum(row["cost_usd"] for row in rows), abs=1e-11)
    assert found["total"]["saved_usd"] == pytest.approx(sum(row["saved_usd"] for row in rows), abs=1e-11)
    assert {name: sums["requests"] for name, sums in found["by"]["model"].items()} == {"fair": 2, "good": 1}
    assert "3 of 3 requests are compared with their baseline" in shown
    assert "$0.000000 in 0 jobs" in shown
    assert (
        found["total"]["expected_error_low"] < found["total"]["expected_error"] < found["total"]["expected_error_high"]
    )


def test_a_filtered_report_nets_out_no_costs_of_measuring(fleet: Fleet) -> None:
    environ = environment(fleet.proxy.folder / "cli", UNIROUTE_URL=fleet.url, UNIROUTE_ADMIN_KEY=ADMIN_KEY)
    found = json.loads(run_command("report", "--json", "--reason", "pinned", environ=environ).stdout)

    assert (found["total"]["requests"], found["spending"], found["total"]["net_saved_usd"]) == (2, None, None)


def test_the_report_is_one_page_without_scripts_that_needs_no_other_file(fleet: Fleet, tmp_path: Path) -> None:
    environ = environment(fleet.proxy.folder / "cli", UNIROUTE_URL=fleet.url, UNIROUTE_ADMIN_KEY=ADMIN_KEY)
    path = tmp_path / "report.html"
    done = run_command("report", "--since", "1h", "--html", str(path), environ=environ)
    page = path.read_text()

    assert (done.returncode, done.stdout) == (0, "")
    assert f"{path}: the report of 3 requests" in done.stderr
    assert not re.search(r"<script|<link|src=|href=|url\(", page)
    assert all(f'id="by-{name}"' in page for name in ("day", "model", "key", "tag", "cluster", "baseline"))
    assert "Whether quality held" in page
    assert "@media print" in page


def test_an_unknown_grouping_is_refused(fleet: Fleet) -> None:
    environ = environment(fleet.proxy.folder / "cli", UNIROUTE_URL=fleet.url, UNIROUTE_ADMIN_KEY=ADMIN_KEY)
    ended = run_command("report", "--by", "colour", environ=environ)

    assert (ended.returncode, "--by: 'colour' is none of day, model" in ended.stderr) == (2, True)


def test_decisions_are_exported_as_lines_and_as_parquet(fleet: Fleet, tmp_path: Path) -> None:
    lines, table = tmp_path / "decisions.jsonl", tmp_path / "decisions.parquet"
    decisions(fleet, "export", "--out", str(lines), "--reason", "pinned")
    decisions(fleet, "export", "--out", str(table), "--reason", "pinned")
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    rows = read_table(table).to_pylist()

    assert [row["requested"] for row in written] == ["fair", "good"]
    assert [row["id"] for row in rows] == [row["id"] for row in written]
    assert dict(rows[0]["output_tokens"]) == written[0]["output_tokens"] == {"fair": 3.0}
    assert json.loads(rows[0]["attempts"]) == written[0]["attempts"]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Fleet]:
    """A fleet that keeps prompts: three decisions have one, of which one is scored, and one has none."""
    with open_fleet(tmp_path_factory.mktemp("logged"), embedder_cache, log_prompts=True) as opened:
        made = [answered(opened, words) for words in ("Name a river.", "Sort three numbers.", "What is 2 + 2?")]
        answered(opened, "")
        said = {"decision": made[-1], "score": 0.5}
        assert httpx.post(f"{opened.base_url}/feedback", json=said, timeout=60).status_code == 200
        yield opened


def answered(fleet: Fleet, words: str) -> str:
    """Return the decision, once it is kept."""
    body = {"model": "auto", "messages": [{"role": "user", "content": words}]}
    reply = httpx.post(f"{fleet.base_url}/chat/completions", json=body, timeout=60)
    decision = reply.headers["x-uniroute-decision"]
    assert wait_until(lambda: fleet.proxy.admin("GET", f"/admin/decisions/{decision}").status_code == 200)
    return decision


def test_scored_decisions_with_their_prompts_are_an_outcomes_file(logged: Fleet, tmp_path: Path) -> None:
    decisions(logged, "export", "--outcomes", "--out", str(tmp_path / "outcomes.jsonl"))
    ((where, row),) = read_rows(tmp_path / "outcomes.jsonl")
    outcome = parse_row(where, row)

    assert (outcome.prompt, outcome.source, outcome.scores) == ("What is 2 + 2?", "traffic", {"fair": 0.5})
    assert outcome.output_tokens == {"fair": 3}


def test_decisions_with_their_prompts_are_a_file_to_fit_a_map_of_ones_own_to(
    logged: Fleet, tmp_path: Path, embedder_cache: Path
) -> None:
    decisions(logged, "export", "--prompts", "--out", str(tmp_path / "traffic.jsonl"))
    arguments = (str(tmp_path / "traffic.jsonl"), "--out", str(tmp_path / "map"), "--clusters", "2", "--json")
    done = run_command("fit", *arguments, environ=environment(tmp_path / "fit", embedder_cache))

    assert (done.returncode, json.loads(done.stdout)["prompts"]) == (0, 3), done.stderr
    fitted = load_map(tmp_path / "map").fitted_prompts
    assert fitted is not None
    assert fitted.count == 3
