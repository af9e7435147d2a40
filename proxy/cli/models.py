"""`uniroute models`: add, list, show, re-measure and remove models of a running server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxy.cli.model_outcomes import outcomes
from proxy.cli.options import JsonOption, UrlOption, admin_client, finite

if TYPE_CHECKING:
    from proxy.cli.client import ServerClient

models = typer.Typer(no_args_is_help=True, help="Models of a running server. Needs UNIROUTE_ADMIN_KEY.")
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The name that clients see.")]
PromptsOption = Annotated[int | None, typer.Option("--prompts", min=1, help="Validation prompts to ask it.")]
MaxUsdOption = Annotated[
    float | None, typer.Option("--max-usd", min=0.0, callback=finite, help="What the questions may cost.")
]
InputCostOption = Annotated[
    float | None, typer.Option("--input-cost", min=0.0, callback=finite, help="USD per million prompt tokens.")
]
OutputCostOption = Annotated[
    float | None, typer.Option("--output-cost", min=0.0, callback=finite, help="USD per million answer tokens.")
]
NoWaitOption = Annotated[bool, typer.Option("--no-wait", help="Do not wait until it is measured.")]
ProfileOption = Annotated[Path | None, typer.Option("--profile", help="A ready profile (JSON) instead of asking.")]
OutcomesOption = Annotated[Path | None, typer.Option("--outcomes", help="Scored prompts (JSONL) instead of asking.")]
KeyOption = Annotated[str | None, typer.Option("--api-key-env", help="The server's variable that holds its key.")]
ParamOption = Annotated[list[str] | None, typer.Option("--param", help="KEY=VALUE, as temperature=0; repeatable.")]


@models.command()
def add(
    name: NameArgument,
    model: Annotated[str, typer.Option("--model", help="LiteLLM's name of it, as openai/gpt-6-luna.")],
    api_base: Annotated[str | None, typer.Option("--api-base", help="Its address, if not the provider's own.")] = None,
    api_key_env: KeyOption = None,
    param: ParamOption = None,
    input_cost: InputCostOption = None,
    output_cost: OutputCostOption = None,
    prompts: PromptsOption = None,
    max_usd: MaxUsdOption = None,
    profile: ProfileOption = None,
    outcomes: OutcomesOption = None,
    url: UrlOption = None,
    *,
    free: Annotated[bool, typer.Option("--free", help="It costs nothing: it runs on your own machine.")] = False,
    no_wait: NoWaitOption = False,
    as_json: JsonOption = False,
) -> None:
    """Add a model while the server runs, measure it, and let it take traffic.

    Without a cost and without --free its price comes from LiteLLM's price map.
    """
    from proxy.cli.model_bodies import litellm_params_from, model_info_from, profile_from

    body = {
        "model_name": name,
        "litellm_params": litellm_params_from(model, api_base, api_key_env, param or []),
        "model_info": model_info_from(input_cost, output_cost, free=free),
        "profile": profile_from(name, prompts, max_usd, profile, outcomes),
    }
    with admin_client(url) as server:
        answer = server.call("POST", "/admin/models", body)
        _finish(server, answer, no_wait=no_wait, as_json=as_json)


@models.command("profile")
def profile_again(
    name: NameArgument,
    prompts: PromptsOption = None,
    max_usd: MaxUsdOption = None,
    profile: ProfileOption = None,
    outcomes: OutcomesOption = None,
    url: UrlOption = None,
    *,
    no_wait: NoWaitOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a model again. Its old profile serves until the new one is ready."""
    from proxy.cli.model_bodies import profile_from

    body = profile_from(name, prompts, max_usd, profile, outcomes)
    with admin_client(url) as server:
        answer = server.call("POST", f"/admin/models/{name}/profile", body)
        _finish(server, answer, no_wait=no_wait, as_json=as_json)


@models.command("list")
def list_models(url: UrlOption = None, *, as_json: JsonOption = False) -> None:
    """Every model with its state, mean error and price."""
    from proxy.cli import console

    with admin_client(url) as server:
        answer = server.call("GET", "/admin/models")
    if as_json:
        console.emit_json(answer["models"])
        return
    columns = ("model", "state", "mean error", "$/M in", "$/M out", "price from")
    console.table(columns, [_row(card) for card in answer["models"]])
    for card in answer["models"]:
        if card["why"]:
            console.note(f"{card['model_name']}: {card['why']}")
    for warning in dict.fromkeys(card["warning"] for card in answer["models"] if card.get("warning")):
        console.note(f"warning: {warning}")


@models.command()
def show(name: NameArgument, url: UrlOption = None) -> None:
    """Everything known of one model, as JSON."""
    from proxy.cli import console

    with admin_client(url) as server:
        console.emit_json(server.call("GET", f"/admin/models/{name}"))


@models.command()
def remove(name: NameArgument, url: UrlOption = None) -> None:
    """Take a model out of traffic and forget its profile."""
    from proxy.cli import console

    with admin_client(url) as server:
        server.call("DELETE", f"/admin/models/{name}")
    console.note(f"{name} is removed")


models.command()(outcomes)


def _finish(server: ServerClient, answer: Mapping[str, Any], *, no_wait: bool, as_json: bool) -> None:
    """Wait for the job unless told not to; failed work ends the command with status 1."""
    from proxy.cli import console

    job = answer["job"]
    if job is not None and no_wait and not as_json:
        console.note(f"job {job} measures it; `uniroute models show {answer['model']}` says how far it is")
        return
    if job is not None and not no_wait:
        with console.progress() as bars:
            ended = server.follow(job, bars)
        if ended["state"] != "ready":
            raise console.CommandError(f"{answer['model']}: measuring it {ended['state']}: {ended['error']}")
    card = server.call("GET", f"/admin/models/{answer['model']}")
    if as_json:
        console.emit_json({"job": job, **card})
    elif card["profile"] is not None:
        console.say(f"{card['model_name']} is {card['state']}: mean error {card['profile']['mean_error']:.2f}")
        if card.get("warning"):
            console.note(f"warning: {card['warning']}")


def per_million(price: Mapping[str, Any], rate: str) -> str:
    """USD per million tokens, and what it becomes for longer prompts: `1.25, 2.5 above 200k`."""
    from router_core.types import price_field

    if price.get(rate) is None:
        return "unknown"
    tiers = [(field[1], usd) for name, usd in price.items() if (field := price_field(name)) and field[0] == rate]
    shown = []
    for tokens, usd in sorted(tiers, key=lambda tier: tier[0] or 0):
        limit = "" if tokens is None else f" above {tokens // 1000}k" if tokens % 1000 == 0 else f" above {tokens}"
        shown.append(f"{usd * 1e6:.4g}{limit}")
    return ", ".join(shown)


def _row(card: Mapping[str, Any]) -> tuple[str, ...]:
    price = card["price"] or {}
    shown = [per_million(price, f"{side}_cost_per_token") for side in ("input", "output")]
    error = card.get("mean_error")
    job = card.get("job") or {}
    far = f" {job['done']}/{job['total']}" if card["state"] == "profiling" else ""
    return (
        card["model_name"],
        card["state"] + far,
        "" if error is None else f"{error:.2f}",
        *shown,
        price.get("source", ""),
    )
