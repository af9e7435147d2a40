"""Commands that show and change nothing.

`route` shows the choice for one prompt, `decisions` the choices that were made, `validation` the prompts and graders.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from proxy.cli import console
from proxy.cli.console import (
    BadArgument,
    DataDirOption,
    JsonOption,
    UrlOption,
    finite,
    read_settings,
    read_validation_set,
)
from proxy.cli.keys import seconds_of, with_options_of

LambdaOption = Annotated[
    float | None, typer.Option("--lambda", min=0.0, callback=finite, help="Cost weight of this request.")
]


def route(
    prompt: Annotated[str, typer.Argument(help="The user's text.")],
    cost_weight: LambdaOption = None,
    model: Annotated[str, typer.Option("--model", help="auto, uniroute/best or uniroute/cheap.")] = "auto",
    url: UrlOption = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Ask a running server which model it would choose."""
    from proxy.cli.client import caller_client

    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": prompt}]}
    if cost_weight is not None:
        body["uniroute"] = {"lambda": cost_weight}
    with caller_client(url) as server:
        decision = server.call("POST", "/v1/route", body)
    if as_json:
        console.emit_json(decision)
    else:
        show_decision(decision)


def show_decision(decision: Mapping[str, Any]) -> None:
    """Print the choice, the prompt's clusters, the candidates with their figures, and the ineligible models."""
    console.echo(f"{decision['model']}  ({decision['reason']}, λ = {decision['lambda']:g})")
    near = [f"{c['name']} {c['weight']:.0%}" for c in decision["clusters"][:3]]
    if near:
        console.echo(f"  prompt is near: {'; '.join(near)}")
    rows = [candidate_row(candidate) for candidate in decision["candidates"]]
    if rows:
        console.table(("model", "expected error", "expected cost", "score", "chosen at λ"), rows)
    for ruled_out in decision["ineligible"]:
        console.echo(f"  {ruled_out['model']}: not eligible, {ruled_out['why']}")


def candidate_row(candidate: Mapping[str, Any]) -> tuple[str, ...]:
    flips = candidate["flips_at_lambda"]
    return (
        candidate["model"],
        f"{candidate['expected_error']:.2f} [{candidate['error_low']:.2f}, {candidate['error_high']:.2f}]",
        f"${candidate['expected_cost_usd']:.6f}",
        f"{candidate['score']:.3f}",
        "never" if flips is None else f"{flips:.3g}",
    )


decisions = typer.Typer(
    no_args_is_help=True, help="Look at the decisions of a running server. Needs UNIROUTE_ADMIN_KEY."
)

TimeOption = Annotated[str | None, typer.Option(metavar="TIME", help="RFC 3339 with its zone, or as 7d: so long ago.")]


def _filters(
    model: Annotated[str | None, typer.Option("--model", help="Answered by this model.")] = None,
    key: Annotated[str | None, typer.Option("--key", metavar="ID", help="Asked with this client key.")] = None,
    tag: Annotated[str | None, typer.Option("--tag", help="With this tag.")] = None,
    ending: Annotated[str | None, typer.Option("--ending", help="complete, empty, failed, busy, broken …")] = None,
    reason: Annotated[str | None, typer.Option("--reason", help="scored, pinned, sticky, fallback …")] = None,
    since: TimeOption = None,
    until: TimeOption = None,
) -> dict[str, str]:
    """Return the given options as a query. The parameters are the options."""
    times = {"since": _moment(since, "--since"), "until": _moment(until, "--until")}
    stated = {"model": model, "key": key, "tag": tag, "ending": ending, "reason": reason, **times}
    return {name: value for name, value in stated.items() if value is not None}


def _moment(text: str | None, option: str) -> str | None:
    if text is None or not (text[:1].isdigit() and text[-1:] in "smhdw"):
        return text
    seconds = seconds_of(text, option)
    return None if seconds is None else repr(time.time() - seconds)


with_filters = with_options_of(_filters, "query")


@decisions.command("list")
@with_filters
def list_decisions(
    limit: Annotated[int, typer.Option("--limit", min=1, help="Show so many, the newest first.")] = 20,
    url: UrlOption = None,
    *,
    as_json: JsonOption = False,
    query: dict[str, str],
) -> None:
    """List decisions, newest first."""
    from proxy.cli.client import admin_client

    with admin_client(url) as server:
        found = list(server.decisions(query, limit))
    if as_json:
        console.emit_json(found)
        return
    columns = ("decision", "received", "requested", "model", "reason", "ending", "cost", "saved")
    console.table(columns, [_decision_row(decision) for decision in found])


def _decision_row(decision: Mapping[str, Any]) -> tuple[str, ...]:
    names = ("id", "received_at", "requested", "model", "reason", "ending")
    return *(decision[name] for name in names), _usd(decision["cost_usd"]), _usd(decision["saved_usd"])


def _usd(amount: float | None) -> str:
    return "?" if amount is None else f"${amount:.6f}"


@decisions.command("show")
def show_one(
    decision: Annotated[str, typer.Argument(metavar="ID", help="As the header x-uniroute-decision has it.")],
    url: UrlOption = None,
) -> None:
    """Print one decision, whole, as JSON."""
    from proxy.cli.client import admin_client

    with admin_client(url) as server:
        console.emit_json(server.call("GET", f"/admin/decisions/{quote(decision, safe='')}"))


@decisions.command("export")
@with_filters
def export_decisions(
    out: Annotated[Path | None, typer.Option("--out", help="FILE.jsonl or FILE.parquet; stdout if left out.")] = None,
    url: UrlOption = None,
    *,
    outcomes: Annotated[
        bool, typer.Option("--outcomes", help="Only those with a prompt and a score: an outcomes file.")
    ] = False,
    prompts: Annotated[
        bool, typer.Option("--prompts", help="Only those with a prompt: a file for `uniroute fit`.")
    ] = False,
    query: dict[str, str],
) -> None:
    """Write whole decisions, one a line, newest first, with the fields of an outcomes file beside their own."""
    from proxy.cli.client import admin_client

    parquet = out is not None and out.suffix == ".parquet"
    if parquet and find_spec("pyarrow") is None:
        raise BadArgument("--out: writing Parquet needs pyarrow; pip install 'uniroute[parquet]'")
    if out is not None:
        console.require_writable(out, "--out")
    with admin_client(url) as server:
        rows = (
            outcome_row(decision)
            for decision in server.decisions(query)
            if (decision["prompt"] or not (outcomes or prompts)) and (decision["score"] is not None or not outcomes)
        )
        if out is None:
            for row in rows:
                console.echo(json.dumps(row))
            return
        count = _write_parquet(out, rows) if parquet else _write_lines(out, rows)
    console.echo_err(f"{out}: {count} decisions")


def outcome_row(decision: Mapping[str, Any]) -> dict[str, Any]:
    """Return a decision with the fields of an outcomes file: the one model that answered, as far as it is graded."""
    model, usage, score = decision["model"], decision["usage"], decision.get("score")
    whole = decision["ending"] == "complete"
    return {
        **decision,
        "source": "traffic",
        "scores": {} if score is None else {model: score},
        "output_tokens": {model: usage["output_tokens"]} if whole and usage["output_tokens"] else {},
        "seconds": {model: decision["times"]["ended_s"]} if whole else {},
    }


def _write_lines(out: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    with out.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(f"{json.dumps(row)}\n")
            count += 1
    return count


# Rows that are held in memory at once.
_ROW_GROUP = 2000

_PER_MODEL = ("scores", "output_tokens", "seconds")

_NESTED = ("clusters", "candidates", "ineligible", "attempts", "times", "usage", "baseline")


def _write_parquet(out: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write plain columns as they are, those of an outcomes file as maps, and what is nested otherwise as JSON."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    text, number = pa.string(), pa.float64()
    columns = {
        **dict.fromkeys(("id", "request", "received_at", "ended_at", "key", "api", "requested", "model"), text),
        **dict.fromkeys(("reason", "ending", "map", "degraded", "lost_affinity", "prompt", "source"), text),
        **dict.fromkeys(("expected_error", "lambda", "cost_usd", "failed_attempts_cost_usd", "saved_usd"), number),
        "score": number,
        "state_version": pa.int64(),
        "cost_estimated": pa.bool_(),
        "tags": pa.list_(text),
        **dict.fromkeys(_PER_MODEL, pa.map_(text, number)),
        **dict.fromkeys(_NESTED, text),
    }
    schema, count, left = pa.schema(columns), 0, iter(rows)
    with ParquetWriter(out, schema) as writer:
        while group := [_parquet_row(row, columns) for row in islice(left, _ROW_GROUP)]:
            writer.write_table(pa.Table.from_pylist(group, schema))
            count += len(group)
    return count


def _parquet_row(row: Mapping[str, Any], columns: Iterable[str]) -> dict[str, Any]:
    packed: dict[str, Any] = {name: list(row[name].items()) for name in _PER_MODEL}
    packed |= {name: json.dumps(row[name]) for name in _NESTED}
    return {name: packed.get(name, row.get(name)) for name in columns}


validation = typer.Typer(
    no_args_is_help=True, help="Inspect the validation set: the prompts that models are measured on."
)

SetArgument = Annotated[str, typer.Argument(metavar="[FILE]", help="A JSONL file; the built-in set if left out.")]


@validation.command("list")
def list_families(source: SetArgument = "builtin", *, as_json: JsonOption = False) -> None:
    """List the families of the set, with the number of prompts and how they are graded."""
    chosen = read_validation_set(source)
    prompts = Counter(prompt.family for prompt in chosen)
    graders = {family: ", ".join(sorted({p.grader.type for p in chosen if p.family == family})) for family in prompts}
    if as_json:
        families = [{"family": family, "prompts": n, "grader": graders[family]} for family, n in prompts.items()]
        console.emit_json({"id": chosen.id, "prompts": len(chosen), "families": families})
        return
    console.echo(f"{len(chosen)} prompts in {len(prompts)} families (set {chosen.id})")
    console.table(("family", "prompts", "grader"), [(f, n, graders[f]) for f, n in sorted(prompts.items())])


@validation.command()
def export(
    source: SetArgument = "builtin",
    out: Annotated[Path | None, typer.Option("--out", help="Write here instead of stdout.")] = None,
) -> None:
    """Write the set as JSONL, one prompt a line, as a start for your own."""
    lines = [json.dumps(prompt.to_json(), ensure_ascii=False) for prompt in read_validation_set(source)]
    if out is None:
        console.echo("\n".join(lines))
        return
    try:
        out.write_text("\n".join(lines) + "\n", "utf-8")
    except OSError as error:
        raise BadArgument(f"--out: {out} cannot be written ({error.strerror})") from None
    console.echo_err(f"{out}: {len(lines)} prompts")


TRAFFIC_HELP = """Prompts of your traffic, as for `uniroute fit` (`uniroute decisions export --prompts` writes them):
warns of languages that no prompt of the set is in."""

# A language of the traffic counts if it has this share of its prompts: of short texts some are taken for another.
MIN_LANGUAGE_SHARE = 0.02


def unlabelled_languages(languages: Collection[str], traffic: Iterable[str]) -> dict[str, float]:
    """Return the languages of the traffic that are not in `languages`, with their shares, the largest first."""
    from router_core.languages import language_of

    found = Counter(map(language_of, traffic))
    return {
        language: count / found.total()
        for language, count in found.most_common()
        if language and language not in languages and count >= MIN_LANGUAGE_SHARE * found.total()
    }


@validation.command()
def check(
    source: SetArgument = "builtin",
    traffic: Annotated[list[Path] | None, typer.Option("--traffic", metavar="FILE", help=TRAFFIC_HELP)] = None,
    data_dir: DataDirOption = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Check a set: report its first broken line, or the clusters of the map with few labels, and its languages."""
    from proxy.server.startup import load_cluster_map
    from router_core.clustering import assign_prompts
    from router_core.validation.validation_set import coverage, thin_clusters

    console.check_prompt_files(traffic or ())
    chosen = read_validation_set(source)
    settings = read_settings(None, data_dir=data_dir)
    cluster_map = load_cluster_map(settings)
    embedder = console.load_embedder(settings.embedder, settings.data_dir)
    labels = coverage(assign_prompts([prompt.text for prompt in chosen], embedder, cluster_map), cluster_map.size)
    languages = Counter(prompt.language for prompt in chosen)
    unlabelled = unlabelled_languages(languages, console.read_prompts(traffic or ()))
    thin = [(k, cluster_map.names[k], float(labels[k])) for k in thin_clusters(labels)]
    if as_json:
        rows = [{"cluster": k, "name": name, "label_weight": round(weight, 3)} for k, name, weight in thin]
        spread = {"languages": dict(languages.most_common()), "unlabelled_languages": unlabelled}
        console.emit_json(
            {"id": chosen.id, "prompts": len(chosen), "clusters": cluster_map.size, "thin": rows} | spread
        )
        return
    console.echo(f"{len(chosen)} prompts, every line is good")
    console.echo(f"languages: {', '.join(f'{language} {count}' for language, count in languages.most_common())}")
    for language, share in unlabelled.items():
        console.echo_err(f"warning: {share:.0%} of the traffic is in {language!r}, which no prompt of the set is in")
    console.echo(f"{cluster_map.size - len(thin)} of {cluster_map.size} clusters have label weight 2 or more")
    if thin:
        console.table(("thin cluster", "name", "label weight"), [(k, n, f"{weight:.2f}") for k, n, weight in thin])
