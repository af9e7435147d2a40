"""`uniroute models outcomes`: the graded answers of measured models, as the files that `uniroute evaluate` reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxy.cli.options import UrlOption, admin_client

if TYPE_CHECKING:
    from proxy.cli.client import ServerClient

Card = Mapping[str, Any]
Line = Mapping[str, Any]
NamesArgument = Annotated[list[str] | None, typer.Argument(metavar="NAME", help="All models if left out.")]


def outcomes(
    out: Annotated[Path, typer.Option("--out", help="The outcomes file to write, JSONL.")],
    names: NamesArgument = None,
    prices: Annotated[Path | None, typer.Option("--prices", help="Also write their prices of now, as JSON.")] = None,
    url: UrlOption = None,
) -> None:
    """Write what the latest job of each model asked, and how the answers were graded.

    Answers are kept for 30 days after their job has ended. Prompts that are no longer in the validation set are left
    out, and so are models that were never asked: those with a profile that was handed over.
    """
    from proxy.cli import console

    with admin_client(url) as server:
        cards = _cards(server, names or [])
        answered = {card["model_name"]: _answers(server, card) for card in cards}
    missing = [name for name, lines in answered.items() if not lines]
    if missing and (names or len(missing) == len(answered)):
        raise console.CommandError(_no_answers(missing))
    if missing:
        console.note(f"left out: {_no_answers(missing)}")
    lines = joined(line for found in answered.values() for line in found)
    stated = [_price(card) for card in cards if answered[card["model_name"]]] if prices else []
    _write(out, "--out", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    if prices:
        _write(prices, "--prices", json.dumps(dict(stated), ensure_ascii=False, indent=2) + "\n")
    asked = len(answered) - len(missing)
    console.note(f"{out}: {len(lines)} prompts and the answers of {asked} model{'s' if asked != 1 else ''}")


def joined(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """Lines of the same prompt as one, in order of first appearance."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        first = found.setdefault(line["prompt"], {**line, "scores": {}, "output_tokens": {}})
        first["scores"] |= line["scores"]
        first["output_tokens"] |= line.get("output_tokens", {})
    return list(found.values())


def _cards(server: ServerClient, names: Sequence[str]) -> list[Card]:
    """Of the named models, or of all."""
    if names:
        return [server.call("GET", f"/admin/models/{name}") for name in dict.fromkeys(names)]
    cards: list[Card] = server.call("GET", "/admin/models")["models"]
    return cards


def _answers(server: ServerClient, card: Card) -> list[Line]:
    from proxy.cli import console

    if card["job"] is None:
        return []
    lines: list[Line] = server.call("GET", f"/admin/jobs/{card['job']['id']}/outcomes")["outcomes"]
    if lines and card["job"]["state"] != "ready":
        console.note(f"{card['model_name']}: its latest job is {card['job']['state']}; these are its answers so far")
    return lines


def _no_answers(names: Sequence[str]) -> str:
    verb = "has" if len(names) == 1 else "have"
    return (
        f"{', '.join(names) or 'the server'} {verb} no graded answers: not asked here, or more than 30 days ago;"
        " `uniroute models profile NAME` asks"
    )


def _price(card: Card) -> tuple[str, dict[str, float]]:
    """Raises CommandError: an unknown price is not zero, and no file could say so."""
    from proxy.cli.console import CommandError
    from proxy.cli.deployed import price_of

    price = price_of(card)
    if price is None:
        raise CommandError(f"--prices: no price of {card['model_name']} is known; state one, or leave the model out")
    return card["model_name"], price.stated()


def _write(path: Path, where: str, text: str) -> None:
    from proxy.cli.console import BadArgument

    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise BadArgument(f"{where}: {path} cannot be written ({error.strerror})") from None
