"""What the commands on client keys have in common: their options, and these as the body that HTTP takes as well."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxy.cli.console import BadArgument

if TYPE_CHECKING:
    from proxy.state.client_keys import ClientKey

NONE = "none"
"""Given in place of a number, it takes the limit away."""
_OPTIONS = {
    "name": "NAME",
    "models": "--model",
    "lambda_default": "--lambda",
    "expires_in_s": "--expires-in",
    "grace_s": "--grace",
}
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_DURATION = re.compile(r"([0-9]{1,9})([smhdw])")

KeyId = Annotated[str, typer.Argument(metavar="ID", help="As `keys list` shows it.")]
ModelsOption = Annotated[list[str] | None, typer.Option("--model", help="Allow only this model; repeatable.")]
RoleOption = Annotated[str | None, typer.Option("--role", help="client (asks models), viewer (reads) or admin.")]
ExpiresOption = Annotated[
    str | None, typer.Option("--expires-in", metavar="TIME", help="As 30d, 12h, 90m; 0s is now, none is never.")
]
LambdaOption = Annotated[str | None, typer.Option("--lambda", metavar="λ", help="For requests that state none.")]
LambdaMinOption = Annotated[str | None, typer.Option("--lambda-min", metavar="λ", help="The least λ it may ask for.")]
LambdaMaxOption = Annotated[str | None, typer.Option("--lambda-max", metavar="λ", help="The largest.")]
RequestsOption = Annotated[str | None, typer.Option("--requests-per-minute", metavar="N")]
TokensOption = Annotated[
    str | None, typer.Option("--tokens-per-minute", metavar="N", help="Of prompt and answer together.")
]
UsdPerDayOption = Annotated[str | None, typer.Option("--usd-per-day", metavar="USD", help="From midnight UTC.")]
UsdPerMonthOption = Annotated[str | None, typer.Option("--usd-per-month", metavar="USD")]


def key_body(expires_in: str | None, models: list[str] | None, **options: str | None) -> dict[str, Any]:
    """The options that were given, under the names and with the types that POST /admin/keys reads."""
    body: dict[str, Any] = {} if models is None else {"models": models}
    if expires_in is not None:
        body["expires_in_s"] = seconds_of(expires_in, "--expires-in")
    for name, text in options.items():
        if text is not None:
            body[name] = text if name in ("name", "role") else _number(text, option_of(name))
    return body


def checked(read: Callable[[], Any]) -> Any:
    """What `read` returns; what HTTP would answer 400 to is a bad argument, under the option's name."""
    from proxy.errors import BadRequest
    from proxy.state.client_keys import InvalidKey

    try:
        return read()
    except (BadRequest, InvalidKey) as error:
        raise BadArgument(f"{option_of(error.param or '')}: {error}") from None


def option_of(field: str) -> str:
    return _OPTIONS.get(field, f"--{field.replace('_', '-')}")


def seconds_of(text: str, option: str) -> int | None:
    """`30d` → seconds; None for `none`. Raises BadArgument."""
    if text == NONE:
        return None
    if found := _DURATION.fullmatch(text):
        return int(found[1]) * _UNITS_S[found[2]]
    raise BadArgument(f"{option}: must be a number and s, m, h, d or w, as 30d, or {NONE}; got {text!r}")


def rows_of(keys: tuple[ClientKey, ...], now: float) -> list[tuple[str, ...]]:
    """One of `keys list`: id, name, role, state, expires, models."""
    from proxy.routes.key_bodies import shown_key

    return [
        (
            *(key.id, key.name, key.role),
            "revoked" if key.revoked else "expired" if key.expired(now) else "active",
            shown_key(key)["expires_at"] or "never",
            "all" if key.models is None else ", ".join(key.models),
        )
        for key in keys
    ]


def _number(text: str, option: str) -> int | float | None:
    if text == NONE:
        return None
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise BadArgument(f"{option}: must be a number, or {NONE}; got {text!r}") from None
