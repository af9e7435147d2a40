from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from proxy.cli import console
from proxy.cli.console import BadArgument, JsonOption, UrlOption
from proxy.cli.inspection import with_filters

_ONLY_TIMES = frozenset({"since", "until"})

_DECIMALS = 6


@with_filters
def report(
    by: Annotated[str, typer.Option("--by", help="The table: day, model, key, tag, cluster or baseline.")] = "model",
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write all tables into one page, to read or print.")
    ] = None,
    url: UrlOption = None,
    *,
    as_json: JsonOption = False,
    query: dict[str, str],
) -> None:
    """Report what was spent, what routing saved and whether quality held, by the decisions that are kept."""
    from proxy.cli.client import admin_client
    from proxy.storage.savings import GROUPINGS

    if by not in GROUPINGS:
        raise BadArgument(f"--by: {by!r} is none of {', '.join(GROUPINGS)}")
    if html is not None:
        console.require_writable(html, "--html")
    with admin_client(url) as server, console.progress() as bars:
        found = server.report(query, bars)
        if html is not None:
            html.write_text(_page(found, query, server.url), "utf-8")
            console.echo_err(f"{html}: the report of {found['total']['requests']} requests")
    if as_json:
        console.emit_json(found)
    elif html is None:
        _print(found, by)


def _print(found: Mapping[str, Any], by: str) -> None:
    from proxy.storage.savings import coverage_in_words, quality_in_words

    total, spending = found["total"], found["spending"]
    columns = (by, "requests", "cost", "baseline", "saved", "share", "expected error", "of the baseline", "observed")
    rows = [_row(group, sums) for group, sums in found["by"][by].items()]
    console.table(columns, [*rows, _row("in all", total)])
    console.echo(f"  {total['compared']} of {total['requests']} requests are compared with their baseline:")
    console.echo("  the model that was asked for by name, or else the best on average that the key may use.")
    if total["unpriced"]:
        console.echo(f"  {total['unpriced']} requests are of unknown cost, and in no sum.")
    if spending is not None:
        own = spending["profiling"]
        console.echo(f"  measuring models cost {_usd(own['usd'])} in {own['jobs']} jobs:")
        console.echo(f"  {_usd(total['net_saved_usd'])} are saved net of that.")
    console.echo(f"  {quality_in_words(total)}")
    if spending is not None:
        console.echo(f"  {coverage_in_words(found)}")


def _row(group: str, sums: Mapping[str, Any]) -> tuple[str, ...]:
    share = sums["saved_share"]
    names = ("expected_error", "baseline_expected_error", "observed_error")
    return (
        group,
        str(sums["requests"]),
        *(_usd(sums[name]) for name in ("cost_usd", "baseline_usd", "saved_usd")),
        "?" if share is None else f"{share:.1%}",
        *(_bounded(sums, name) for name in names),
    )


def _bounded(sums: Mapping[str, Any], name: str) -> str:
    if sums[name] is None:
        return "?"
    return f"{sums[name]:.3f} [{sums[f'{name}_low']:.3f}, {sums[f'{name}_high']:.3f}]"


def _usd(amount: float) -> str:
    return f"{'-' if amount < 0 else ''}${abs(amount):.{_DECIMALS}f}"


def _page(found: Mapping[str, Any], query: Mapping[str, str], server: str) -> str:
    """Return the report as one HTML file that needs no other."""
    from proxy.dashboard.page import environment, static_files
    from proxy.storage.savings import GROUPINGS, coverage_in_words, quality_in_words
    from router_core.text import rfc3339

    stated = {name: value for name, value in query.items() if name not in _ONLY_TIMES}
    times = {name: _moment(query[name]) for name in ("since", "until") if name in query}
    said = [*(f"{name} {value}" for name, value in times.items()), *(f"{name} {each}" for name, each in stated.items())]
    return (
        environment()
        .get_template("report.html")
        .render(
            style=static_files()["page.css"][0].decode(),
            found=found,
            words=quality_in_words(found["total"]),
            covered=coverage_in_words(found) if found["spending"] is not None else "",
            groupings=tuple(GROUPINGS),
            period=f"Requests {', '.join(said)}." if said else "All requests whose decisions are kept.",
            made_at=rfc3339(time.time()),
            server=server,
        )
    )


def _moment(text: str) -> str:
    """Write a time of the query for people: Unix seconds as RFC 3339."""
    from router_core.text import rfc3339

    try:
        return rfc3339(float(text))
    except (ValueError, OverflowError):
        return text
