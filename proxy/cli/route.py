"""`uniroute route`: which model would answer a prompt, and why. Nothing is forwarded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from proxy.cli.options import JsonOption, UrlOption, finite

LambdaOption = Annotated[
    float | None, typer.Option("--lambda", min=0.0, callback=finite, help="Cost weight for this one.")
]


def route(
    prompt: Annotated[str, typer.Argument(help="The user's text.")],
    cost_weight: LambdaOption = None,
    model: Annotated[str, typer.Option("--model", help="auto, uniroute/best, uniroute/cheap.")] = "auto",
    url: UrlOption = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Ask a running server which model it would choose."""
    from proxy.cli import console
    from proxy.cli.options import caller_client

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
    """The choice, the prompt's clusters, every candidate with its figures, and who was ruled out."""
    from proxy.cli import console

    console.say(f"{decision['model']}  ({decision['reason']}, λ = {decision['lambda']:g})")
    near = [f"{c['name']} {c['weight']:.0%}" for c in decision["clusters"][:3]]
    if near:
        console.say(f"  prompt is near: {'; '.join(near)}")
    rows = [candidate_row(candidate) for candidate in decision["candidates"]]
    if rows:
        console.table(("model", "expected error", "expected cost", "score", "chosen at λ"), rows)
    for ruled_out in decision["ineligible"]:
        console.say(f"  {ruled_out['model']}: not eligible, {ruled_out['why']}")


def candidate_row(candidate: Mapping[str, Any]) -> tuple[str, ...]:
    flips = candidate["flips_at_lambda"]
    return (
        candidate["model"],
        f"{candidate['expected_error']:.2f} [{candidate['error_low']:.2f}, {candidate['error_high']:.2f}]",
        f"${candidate['expected_cost_usd']:.6f}",
        f"{candidate['score']:.3f}",
        "never" if flips is None else f"{flips:.3g}",
    )
