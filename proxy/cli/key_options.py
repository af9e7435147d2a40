"""What the commands on client keys have in common: their options, and these as the body that HTTP takes as well."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxy.cli.console import BadArgument

if TYPE_CHECKING:
    from proxy.storage.client_keys import ClientKey

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
Body = dict[str, Any]
"""What was stated of a key, under the names and with the types that POST /admin/keys reads."""


def _stated(
    models: Annotated[list[str] | None, typer.Option("--model", help="Allow only this model; repeatable.")] = None,
    role: Annotated[str | None, typer.Option(help="client (asks models), viewer (reads) or admin.")] = None,
    expires_in: Annotated[
        str | None, typer.Option(metavar="TIME", help="As 30d, 12h, 90m; 0s is now, none is never.")
    ] = None,
    lambda_default: Annotated[
        str | None, typer.Option("--lambda", metavar="λ", help="For requests that state none.")
    ] = None,
    lambda_min: Annotated[str | None, typer.Option(metavar="λ", help="The least λ it may ask for.")] = None,
    lambda_max: Annotated[str | None, typer.Option(metavar="λ", help="The largest.")] = None,
    requests_per_minute: Annotated[str | None, typer.Option(metavar="N")] = None,
    tokens_per_minute: Annotated[str | None, typer.Option(metavar="N", help="Of prompt and answer together.")] = None,
    usd_per_day: Annotated[str | None, typer.Option(metavar="USD", help="From midnight UTC.")] = None,
    usd_per_month: Annotated[str | None, typer.Option(metavar="USD")] = None,
) -> Body:
    """Every option that says what a key may do; those that were given, as a body."""
    numbers = {
        "lambda_default": lambda_default,
        "lambda_min": lambda_min,
        "lambda_max": lambda_max,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "usd_per_day": usd_per_day,
        "usd_per_month": usd_per_month,
    }
    body: Body = {name: value for name, value in (("models", models), ("role", role)) if value is not None}
    if expires_in is not None:
        body["expires_in_s"] = seconds_of(expires_in, "--expires-in")
    return body | {name: _number(text, option_of(name)) for name, text in numbers.items() if text is not None}


def states_a_key(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every option that says what a key may do, and hand it these as `body`."""
    stating = inspect.signature(_stated, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True)

    @wraps(command)
    def stated(**given: Any) -> None:
        body = _stated(**{name: given.pop(name) for name in stating})
        command(**given, body=body)

    whose, *others = own.parameters.values()
    shown = [whose, *stating.values(), *(other for other in others if other.name != "body")]
    taken = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in shown]
    stated.__dict__["__signature__"] = own.replace(parameters=taken)
    return stated


def checked(read: Callable[[], Any]) -> Any:
    """What `read` returns; what HTTP would answer 400 to is a bad argument, under the option's name."""
    from proxy.errors import BadRequest
    from proxy.storage.client_keys import InvalidKey

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
    from proxy.server.admin_schemas import shown_key

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
