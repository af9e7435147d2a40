"""`uniroute prices`: fetch prices into the store, with no server needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from proxy.cli.options import ConfigOption, DataDirOption, JsonOption, read_settings, run

if TYPE_CHECKING:
    from router_core.types import Price

prices = typer.Typer(no_args_is_help=True, help="Live prices, in the store that servers read.")


@prices.callback()
def group() -> None:
    """Live prices, in the store that servers read."""  # without a callback typer would merge a lone command into it


@prices.command()
def sync(
    feed: Annotated[str | None, typer.Argument(metavar="[URL]", help="Another map in LiteLLM's format.")] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Fetch prices now. Without a URL, `price_url` or the map that comes with LiteLLM."""
    from proxy.cli import console
    from proxy.cli.price_sync import sync_once

    if feed is not None and not feed.startswith(("http://", "https://")):
        raise console.BadArgument(f"URL: must start with http:// or https://; got {feed!r}")
    report = run(sync_once(read_settings(config, data_dir=data_dir), feed))
    if as_json:
        console.emit_json(report.to_json())
        return
    console.say(f"prices from {report.source}")
    rows = [(name, *_per_million(price)) for name, price in report.updated.items()]
    if rows:
        console.table(("updated", "$/M in", "$/M out"), rows)
    for kind in ("unchanged", "kept", "unknown"):
        if names := getattr(report, kind):
            console.say(f"  {kind}: {', '.join(names)}")
    if not (report.updated or report.unchanged or report.kept or report.unknown):
        console.note("the store has no models; those of a configuration file are priced with --config FILE")


def _per_million(price: Price) -> tuple[str, str]:
    from proxy.cli.models import per_million

    return per_million(price.stated(), "input_cost_per_token"), per_million(price.stated(), "output_cost_per_token")
