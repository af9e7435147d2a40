from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxy.cli import console
from proxy.cli.console import (
    BadArgument,
    CommandError,
    ConfigOption,
    DataDirOption,
    JsonOption,
    UrlOption,
    finite,
    load_embedder,
    read_settings,
    require_readable,
)

if TYPE_CHECKING:
    from proxy.cli.client import ServerClient
    from proxy.settings.schema import Settings
    from proxy.storage.price_feed import SyncReport
    from proxy.storage.records import CurrentPrice, ModelRecord
    from proxy.storage.state_reader import StoredState


Card = Mapping[str, Any]

OutcomeLine = Mapping[str, Any]

models = typer.Typer(no_args_is_help=True, help="Manage the models of a running server. Needs UNIROUTE_ADMIN_KEY.")

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The name that clients see.")]

NamesArgument = Annotated[list[str] | None, typer.Argument(metavar="NAME", help="All models if left out.")]

PromptsOption = Annotated[int | None, typer.Option("--prompts", min=1, help="Validation prompts to ask it.")]

MaxUsdOption = Annotated[
    float | None, typer.Option("--max-usd", min=0.0, callback=finite, help="What measuring it may cost.")
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


EffortOption = Annotated[
    str | None,
    typer.Option("--effort", help="auto, or efforts with commas, as low,high or 2048,16384: each becomes NAME@EFFORT."),
]


@models.command()
def add(
    name: NameArgument,
    model: Annotated[str, typer.Option("--model", help="LiteLLM's name of it, as openai/gpt-6-luna.")],
    api_base: Annotated[str | None, typer.Option("--api-base", help="Its address, if not the provider's own.")] = None,
    api_key_env: KeyOption = None,
    param: ParamOption = None,
    input_cost: InputCostOption = None,
    output_cost: OutputCostOption = None,
    effort: EffortOption = None,
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
    """Add a model while the server runs, measure it, and route to it.

    Without a cost and without --free its price comes from LiteLLM's price map.
    """
    from proxy.cli.client import admin_client
    from proxy.settings.effort import efforts_of_text

    stated_effort = {} if effort is None else {"effort": efforts_of_text(effort)}
    body = {
        "model_name": name,
        "litellm_params": litellm_params_from(model, api_base, api_key_env, param or []),
        "model_info": {**model_info_from(input_cost, output_cost, free=free), **stated_effort},
        "profile": profile_from(name, prompts, max_usd, profile, outcomes),
    }
    with admin_client(url) as server:
        answer = server.call("POST", "/admin/models", body)
        _finish(server, answer, no_wait=no_wait, as_json=as_json)


@models.command("profile")
def reprofile(
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
    from proxy.cli.client import admin_client

    body = profile_from(name, prompts, max_usd, profile, outcomes)
    with admin_client(url) as server:
        answer = server.call("POST", f"/admin/models/{name}/profile", body)
        _finish(server, answer, no_wait=no_wait, as_json=as_json)


@models.command("list")
def list_models(url: UrlOption = None, *, as_json: JsonOption = False) -> None:
    """List every model with its state, mean error and price."""
    from proxy.cli.client import admin_client

    with admin_client(url) as server:
        answer = server.call("GET", "/admin/models")
    if as_json:
        console.emit_json(answer["models"])
        return
    columns = ("model", "state", "mean error", "$/M in", "$/M out", "price from")
    console.table(columns, [_row(card) for card in answer["models"]])
    for card in answer["models"]:
        if card["why"]:
            console.echo_err(f"{card['model_name']}: {card['why']}")
    for warning in dict.fromkeys(card["warning"] for card in answer["models"] if card.get("warning")):
        console.echo_err(f"warning: {warning}")


@models.command()
def show(name: NameArgument, url: UrlOption = None) -> None:
    """Print all that is known of one model, as JSON."""
    from proxy.cli.client import admin_client

    with admin_client(url) as server:
        console.emit_json(server.call("GET", f"/admin/models/{name}"))


@models.command()
def remove(name: NameArgument, url: UrlOption = None) -> None:
    """Take a model out of traffic and forget its profile."""
    from proxy.cli.client import admin_client

    with admin_client(url) as server:
        server.call("DELETE", f"/admin/models/{name}")
    console.echo_err(f"{name} is removed")


@models.command()
def outcomes(
    out: Annotated[Path, typer.Option("--out", help="The outcomes file to write, JSONL.")],
    names: NamesArgument = None,
    prices: Annotated[Path | None, typer.Option("--prices", help="Also write their current prices, as JSON.")] = None,
    url: UrlOption = None,
) -> None:
    """Write the prompts of each model's latest job, with the grades of its answers.

    Answers are kept for 30 days after their job has ended. Prompts that are no longer in the validation set are left
    out, and so are models that were never asked: those with a profile that was handed over.
    """
    from proxy.cli.client import admin_client

    with admin_client(url) as server:
        cards = _cards(server, names or [])
        answered = {card["model_name"]: _answers(server, card) for card in cards}
    missing = [name for name, lines in answered.items() if not lines]
    if missing and (names or len(missing) == len(answered)):
        raise console.CommandError(_no_answers(missing))
    if missing:
        console.echo_err(f"left out: {_no_answers(missing)}")
    lines = joined(line for found in answered.values() for line in found)
    stated = [_price(card) for card in cards if answered[card["model_name"]]] if prices else []
    _write(out, "--out", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    if prices:
        _write(prices, "--prices", json.dumps(dict(stated), ensure_ascii=False, indent=2) + "\n")
    asked = len(answered) - len(missing)
    console.echo_err(f"{out}: {len(lines)} prompts and the answers of {asked} model{'s' if asked != 1 else ''}")


@models.command()
def pause(name: NameArgument, url: UrlOption = None) -> None:
    """Leave a model out of traffic until `resume`; requests under way end as they would."""
    _set_paused(name, url, paused=True)
    console.echo_err(f"{name} is paused; `uniroute models resume {name}` lets it go on")


@models.command()
def resume(name: NameArgument, url: UrlOption = None) -> None:
    """Let a paused model go on."""
    _set_paused(name, url, paused=False)
    console.echo_err(f"{name} takes traffic again")


def _set_paused(name: str, url: str | None, *, paused: bool) -> None:
    from proxy.cli.client import admin_client

    with admin_client(url) as server:
        server.call("PATCH", f"/admin/models/{name}", {"paused": paused})


def _finish(server: ServerClient, answer: Mapping[str, Any], *, no_wait: bool, as_json: bool) -> None:
    """Wait for the job, unless told not to, and print what it found. Raises CommandError if it failed."""
    job = answer["job"]
    if job is not None and no_wait and not as_json:
        console.echo_err(f"job {job} measures it; `uniroute models show {answer['model']}` says how far it is")
        return
    if job is not None and not no_wait:
        with console.progress() as bars:
            ended = server.follow(job, bars)
        if ended["state"] != "ready":
            raise console.CommandError(f"{answer['model']}: measuring it {ended['state']}: {ended['error']}")
    card = server.call("GET", f"/admin/models/{answer['model']}")
    if as_json:
        console.emit_json({"job": job, **card})
        return
    for each in [card, *(server.call("GET", f"/admin/models/{name}") for name in card.get("efforts", ()))]:
        if each["profile"] is not None:
            console.echo(f"{each['model_name']} is {each['state']}: mean error {each['profile']['mean_error']:.2f}")
            if each.get("warning"):
                console.echo_err(f"warning: {each['warning']}")
        elif each.get("why") and each.get("effort_of"):
            console.echo_err(f"{each['model_name']}: {each['why']}")


def per_million(price: Mapping[str, Any], rate: str) -> str:
    """Format a price in USD per million tokens, with the prices of longer prompts: `1.25, 2.5 above 200k`."""
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
        card["state"] + far + (", paused" if card.get("paused") else ""),
        "" if error is None else f"{error:.2f}",
        *shown,
        price.get("source", ""),
    )


def litellm_params_from(
    model: str, api_base: str | None, key_variable: str | None, extra: Sequence[str]
) -> dict[str, Any]:
    params: dict[str, Any] = {"model": model}
    if api_base:
        params["api_base"] = api_base
    if key_variable:
        params["api_key"] = f"os.environ/{key_variable.removeprefix('os.environ/')}"
    for pair in extra:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise BadArgument(f"--param takes KEY=VALUE; got {pair!r}")
        params[key] = _value(value)
    return params


def model_info_from(input_cost: float | None, output_cost: float | None, *, free: bool) -> dict[str, Any]:
    """Return `model_info`, with costs in USD per token. The options are in USD per million tokens."""
    stated = {"--input-cost": input_cost, "--output-cost": output_cost}
    if free and any(cost is not None for cost in stated.values()):
        raise BadArgument("--free and a cost contradict each other; give one of them")
    if len(missing := [name for name, cost in stated.items() if cost is None]) == 1:
        raise BadArgument(f"{missing[0]} is missing: a price has both")
    if free or input_cost is None or output_cost is None:
        return {"free": True} if free else {}
    return {"input_cost_per_token": input_cost / 1e6, "output_cost_per_token": output_cost / 1e6}


def profile_from(
    name: str, prompts: int | None, max_usd: float | None, ready: Path | None, outcomes: Path | None
) -> dict[str, Any]:
    """Return how to ask the model, or a profile that is handed over instead."""
    asking = {key: value for key, value in (("prompts", prompts), ("max_usd", max_usd)) if value is not None}
    if sum((bool(asking), ready is not None, outcomes is not None)) > 1:
        raise BadArgument("--profile, --outcomes, and --prompts with --max-usd exclude each other; give one of them")
    if ready is not None:
        return _read_profile(ready)
    return _from_outcomes(outcomes, name) if outcomes is not None else asking


def _read_profile(path: Path) -> dict[str, Any]:
    """Read a profile, or the card that `models show` prints, which has it inside."""
    from router_core.documents import MAX_PROFILE_BYTES, DocumentTooLarge, parse_json, read_bounded

    try:
        document = parse_json(read_bounded(path, MAX_PROFILE_BYTES).decode())
    except OSError as error:
        raise BadArgument(f"--profile: {path} cannot be read ({error.strerror})") from None
    except DocumentTooLarge as error:
        raise BadArgument(f"--profile: {path} {error}") from None
    except ValueError as error:
        raise BadArgument(f"--profile: {path} is not JSON ({error})") from None
    found = document.get("profile", document) if isinstance(document, dict) else None
    if not isinstance(found, dict) or not {"errors", "error_sums"} & found.keys():
        raise BadArgument(f'--profile: {path} is not a profile; it needs "map", "errors" and "labels"')
    return found


def _from_outcomes(path: Path, name: str) -> dict[str, Any]:
    """Build a profile here, with the map and embedder of our own settings; a server with another map refuses it."""
    from proxy.profiling.grading import profile_from_outcomes
    from proxy.server.startup import load_cluster_map

    require_readable(path, "--outcomes")
    config = os.environ.get("UNIROUTE_CONFIG")
    settings = read_settings(Path(config) if config else None)
    cluster_map = load_cluster_map(settings)
    embedder = load_embedder(settings.embedder, settings.data_dir)
    return profile_from_outcomes(path, name, cluster_map, embedder).to_json()


def _value(text: str) -> Any:
    """Read 0.5 as a number, true as a boolean, and whatever is not JSON (NaN too) as text."""
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return text


def _no_number(word: str) -> float:
    raise ValueError(word)


def joined(lines: Iterable[OutcomeLine]) -> list[dict[str, Any]]:
    """Merge the lines of each prompt, in order of first appearance."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        first = found.setdefault(line["prompt"], {**line, "scores": {}, "output_tokens": {}})
        first["scores"] |= line["scores"]
        first["output_tokens"] |= line.get("output_tokens", {})
    return list(found.values())


def _cards(server: ServerClient, names: Sequence[str]) -> list[Card]:
    """Return the cards of the named models, or of all; of a model with efforts, those of its efforts."""
    if names:
        cards = [server.call("GET", f"/admin/models/{name}") for name in dict.fromkeys(names)]
        named = dict.fromkeys(each for card in cards for each in card["efforts"] or (card["model_name"],))
        return [server.call("GET", f"/admin/models/{name}") for name in named]
    return [card for card in server.call("GET", "/admin/models")["models"] if not card["efforts"]]


def _answers(server: ServerClient, card: Card) -> list[OutcomeLine]:
    if card["job"] is None:
        return []
    found: list[OutcomeLine] = server.call("GET", f"/admin/jobs/{card['job']['id']}/outcomes")["outcomes"]
    lines = [line for line in found if card["model_name"] in line["scores"]]  # a job may measure several efforts
    if lines and card["job"]["state"] != "ready":
        state = card["job"]["state"]
        console.echo_err(f"{card['model_name']}: its latest job is {state}; these are its answers so far")
    return lines


def _no_answers(names: Sequence[str]) -> str:
    verb = "has" if len(names) == 1 else "have"
    return (
        f"{', '.join(names) or 'the server'} {verb} no graded answers: not asked here, or more than 30 days ago;"
        " `uniroute models profile NAME` asks"
    )


def _price(card: Card) -> tuple[str, dict[str, float]]:
    """Return a model's name and price. Raises CommandError: no file could say that a price is unknown."""
    from proxy.cli.deployed import price_of

    price = price_of(card)
    if price is None:
        raise CommandError(f"--prices: no price of {card['model_name']} is known; state one, or leave the model out")
    return card["model_name"], price.to_fields()


def _write(path: Path, where: str, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise BadArgument(f"{where}: {path} cannot be written ({error.strerror})") from None


prices = typer.Typer(no_args_is_help=True, help="Fetch live prices into the store that servers read.")


@prices.callback()
def price_commands() -> None:
    """Fetch live prices into the store that servers read."""
    # Without a callback typer would merge a lone command into the group.


@prices.command()
def sync(
    feed: Annotated[str | None, typer.Argument(metavar="[URL]", help="Another map in LiteLLM's format.")] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Fetch prices now. Without a URL, `price_url` or the map that comes with LiteLLM."""
    if feed is not None and not feed.startswith(("http://", "https://")):
        raise BadArgument(f"URL: must start with http:// or https://; got {feed!r}")
    report = asyncio.run(sync_once(read_settings(config, data_dir=data_dir), feed))
    if as_json:
        console.emit_json(report.to_json())
        return
    console.echo(f"prices from {report.source}")
    rows = [
        (name, *(per_million(price.to_fields(), f"{side}_cost_per_token") for side in ("input", "output")))
        for name, price in report.updated.items()
    ]
    if rows:
        console.table(("updated", "$/M in", "$/M out"), rows)
    for kind in ("unchanged", "kept", "unknown"):
        if names := getattr(report, kind):
            console.echo(f"  {kind}: {', '.join(names)}")
    if not (report.updated or report.unchanged or report.kept or report.unknown):
        console.echo_err("the store has no models; those of a configuration file are priced with --config FILE")


@dataclass(frozen=True)
class PricedModels:
    models: Mapping[str, ModelRecord]
    prices: Mapping[str, CurrentPrice]


async def sync_once(settings: Settings, url: str | None = None) -> SyncReport:
    """Price the configured and the stored models from `url`, else `price_url`, else the map that litellm carries.

    Serving processes use the new prices within a second.

    Raises:
        PriceFeedError, StoreUnavailable: nothing was changed, or what was not stored yet is not.
    """
    from proxy.storage.audit_log import CLI
    from proxy.storage.client_keys import AuthRequiredLatch
    from proxy.storage.price_feed import sync_prices
    from proxy.storage.records import ModelRecord
    from proxy.storage.redis import Store
    from proxy.storage.registry import Registry
    from proxy.storage.state_reader import StateReader

    store = await Store.open(settings)
    try:
        configured = {entry.model_name: ModelRecord.of_entry(entry, "config", 0.0) for entry in settings.model_list}
        reader = StateReader(store, time.time)
        await reader.read(configured)
        registry = Registry(store, configured, AuthRequiredLatch(settings.data_dir), CLI)
        return await sync_prices(registry, _priced_models(reader.last, configured), url or settings.price_url)
    finally:
        await store.close()


def _priced_models(stored: StoredState, configured: Mapping[str, ModelRecord]) -> PricedModels:
    from proxy.storage.price_map import bundled_price_map
    from proxy.storage.snapshot import prices_of, unstored_price

    records = {**stored.models, **configured}
    price_map = bundled_price_map()
    unstored = {
        name: unstored_price(record.info, price_map.find(str(record.litellm_params["model"])))
        for name, record in records.items()
    }
    return PricedModels(records, prices_of(records, stored, unstored))
