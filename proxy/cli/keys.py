from __future__ import annotations

import asyncio
import inspect
import re
import time
from collections.abc import Awaitable, Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from proxy.cli import console
from proxy.cli.console import (
    BadArgument,
    ConfigOption,
    DataDirOption,
    JsonOption,
    emit_json,
    open_registry,
    read_settings,
)

if TYPE_CHECKING:
    from proxy.storage.client_keys import ClientKey
    from proxy.storage.registry import KeyRegistry


# In place of a number it removes a limit.
NO_LIMIT = "none"

_OPTION_OF_FIELD = {
    "name": "NAME",
    "models": "--model",
    "tags": "--tag",
    "lambda_default": "--lambda",
    "expires_in_s": "--expires-in",
    "grace_s": "--grace",
}

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}

_DURATION = re.compile(r"([0-9]{1,9})([smhdw])")

KeyId = Annotated[str, typer.Argument(metavar="ID", help="As `keys list` shows it.")]

# The fields of a key that were given, with the names and types of POST /admin/keys.
Body = dict[str, Any]


def _key_fields(
    models: Annotated[list[str] | None, typer.Option("--model", help="Allow only this model; repeatable.")] = None,
    tags: Annotated[
        list[str] | None, typer.Option("--tag", help="Note it in the records of its requests; repeatable.")
    ] = None,
    role: Annotated[str | None, typer.Option(help="client (calls models), viewer (reads) or admin.")] = None,
    expires_in: Annotated[
        str | None, typer.Option(metavar="TIME", help="As 30d, 12h or 90m; 0s is now, none is never.")
    ] = None,
    lambda_default: Annotated[
        str | None, typer.Option("--lambda", metavar="λ", help="The λ of requests that state none.")
    ] = None,
    lambda_min: Annotated[str | None, typer.Option(metavar="λ", help="The smallest λ that it may ask for.")] = None,
    lambda_max: Annotated[str | None, typer.Option(metavar="λ", help="The largest λ that it may ask for.")] = None,
    requests_per_minute: Annotated[str | None, typer.Option(metavar="N", help="Limit requests.")] = None,
    tokens_per_minute: Annotated[
        str | None, typer.Option(metavar="N", help="Limit tokens of prompts and answers together.")
    ] = None,
    usd_per_day: Annotated[
        str | None, typer.Option(metavar="USD", help="Limit the cost of a day, from midnight UTC.")
    ] = None,
    usd_per_month: Annotated[
        str | None, typer.Option(metavar="USD", help="Limit the cost of a calendar month, in UTC.")
    ] = None,
) -> Body:
    """Return the given options as a body. The parameters are the options of a key."""
    numbers = {
        "lambda_default": lambda_default,
        "lambda_min": lambda_min,
        "lambda_max": lambda_max,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "usd_per_day": usd_per_day,
        "usd_per_month": usd_per_month,
    }
    body: Body = {
        name: value for name, value in (("models", models), ("tags", tags), ("role", role)) if value is not None
    }
    if expires_in is not None:
        body["expires_in_s"] = seconds_of(expires_in, "--expires-in")
    return body | {name: _number(text, option_of(name)) for name, text in numbers.items() if text is not None}


def with_options_of(read: Callable[..., Any], into: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the parameters of a function to a command, which gets what the function makes of them as `into`."""
    added = inspect.signature(read, eval_str=True).parameters

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)

        @wraps(command)
        def wrapper(**given: Any) -> None:
            made = read(**{name: given.pop(name) for name in added})
            command(**given, **{into: made})

        first, *others = own.parameters.values()
        parameters = [first, *added.values(), *(other for other in others if other.name != into)]
        keyword_only = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
        wrapper.__dict__["__signature__"] = own.replace(parameters=keyword_only)
        return wrapper

    return decorate


# A command of it gets the options of a key that were given as `body`.
with_key_options = with_options_of(_key_fields, "body")


def with_option_names(read: Callable[[], Any]) -> Any:
    """Return what `read` returns. What HTTP answers with 400 becomes a BadArgument that names the option."""
    from proxy.errors import BadRequest
    from proxy.storage.client_keys import InvalidKey

    try:
        return read()
    except (BadRequest, InvalidKey) as error:
        raise BadArgument(f"{option_of(error.param or '')}: {error}") from None


def option_of(field: str) -> str:
    return _OPTION_OF_FIELD.get(field, f"--{field.replace('_', '-')}")


def seconds_of(text: str, option: str) -> int | None:
    """Return the seconds of a duration as `30d`; None for `none`. Raises BadArgument."""
    if text == NO_LIMIT:
        return None
    if found := _DURATION.fullmatch(text):
        return int(found[1]) * _UNITS_S[found[2]]
    raise BadArgument(f"{option}: must be a number and s, m, h, d or w, as 30d, or {NO_LIMIT}; got {text!r}")


def rows_of(keys: tuple[ClientKey, ...], now: float) -> list[tuple[str, ...]]:
    """Return the rows of `keys list`: id, name, role, state, expires, models."""
    return [
        (
            *(key.id, key.name, key.role),
            "revoked" if key.revoked else "expired" if key.expired(now) else "active",
            key.public_fields()["expires_at"] or "never",
            "all" if key.models is None else ", ".join(key.models),
        )
        for key in keys
    ]


def _number(text: str, option: str) -> int | float | None:
    if text == NO_LIMIT:
        return None
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise BadArgument(f"{option}: must be a number, or {NO_LIMIT}; got {text!r}") from None


T = TypeVar("T")

keys = typer.Typer(no_args_is_help=True, help="Manage client keys. Once there is one, calls without a key are refused.")


@keys.command()
@with_key_options
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    *,
    as_json: JsonOption = False,
    body: Body,
) -> None:
    """Create a key and print its secret, once."""
    from proxy.server.admin_bodies import NewKey
    from proxy.server.strict_bodies import parse_body
    from proxy.storage.audit_log import CREATE_KEY

    body["name"] = name
    fields = with_option_names(lambda: parse_body(NewKey, body).to_change(time.time()))
    made = _with_keys(config, data_dir, lambda registry: registry.create(name, None, fields))
    _log(CREATE_KEY, made[0])
    _show_secret(*made, as_json=as_json)


@keys.command()
@with_key_options
def update(
    key_id: KeyId,
    name: Annotated[str | None, typer.Option("--name", help="Whose key it is.")] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    *,
    all_models: Annotated[bool, typer.Option("--all-models", help="Allow every model again.")] = False,
    no_tags: Annotated[bool, typer.Option("--no-tags", help="Take its tags away.")] = False,
    body: Body,
) -> None:
    """Change what a key may do. Options that are not given stay; `none` removes a limit."""
    from proxy.server.admin_bodies import KeyPatch
    from proxy.server.strict_bodies import parse_body
    from proxy.storage.audit_log import CHANGE_KEY

    if name is not None:
        body["name"] = name
    if all_models:
        if "models" in body:
            raise BadArgument("--all-models: does not go with --model; give one of them")
        body["models"] = None
    if no_tags:
        if "tags" in body:
            raise BadArgument("--no-tags: does not go with --tag; give one of them")
        body["tags"] = None
    if not body:
        raise BadArgument("nothing is stated that should change; see `uniroute keys update --help`")
    fields = with_option_names(lambda: parse_body(KeyPatch, body).to_change(time.time()))
    key = _with_keys(config, data_dir, lambda registry: registry.change(key_id, fields))
    _log(CHANGE_KEY, key)
    emit_json(key.public_fields())


@keys.command()
def rotate(
    key_id: KeyId,
    grace: Annotated[str, typer.Option("--grace", metavar="TIME", help="How long the old secret stays valid.")] = "0s",
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Give a key a new secret and print it, once. The old secret is valid until the grace period ends."""
    from proxy.server.admin_bodies import Rotation
    from proxy.server.strict_bodies import parse_body
    from proxy.storage.audit_log import ROTATE_KEY

    grace_s = with_option_names(lambda: parse_body(Rotation, {"grace_s": seconds_of(grace, "--grace")}).grace_s)
    made = _with_keys(config, data_dir, lambda registry: registry.rotate(key_id, grace_s))
    _log(ROTATE_KEY, made[0])
    _show_secret(*made, as_json=as_json)


@keys.command("list")
def list_keys(config: ConfigOption = None, data_dir: DataDirOption = None, *, as_json: JsonOption = False) -> None:
    """List the keys, without their secrets."""
    found = _with_keys(config, data_dir, lambda registry: registry.listed())
    if as_json:
        console.emit_json([key.public_fields() for key in found])
        return
    console.table(("id", "name", "role", "state", "expires", "models"), rows_of(found, time.time()))


@keys.command()
def show(key_id: KeyId, config: ConfigOption = None, data_dir: DataDirOption = None) -> None:
    """Print what a key may do, as JSON, without its secret."""
    emit_json(_with_keys(config, data_dir, lambda registry: registry.find(key_id)).public_fields())


@keys.command()
def revoke(key_id: KeyId, config: ConfigOption = None, data_dir: DataDirOption = None) -> None:
    """Revoke a key for good. Calls without a key stay refused too."""
    from proxy.storage.audit_log import REVOKE_KEY

    _log(REVOKE_KEY, _with_keys(config, data_dir, lambda registry: registry.revoke(key_id)))
    console.echo_err(f"key {key_id} is revoked")


def _with_keys(config: Path | None, data_dir: Path | None, act: Callable[[KeyRegistry], Awaitable[T]]) -> T:
    settings = read_settings(config, data_dir=data_dir)

    async def work() -> T:
        async with open_registry(settings) as registry:
            return await act(registry.keys)

    done: T = with_option_names(lambda: asyncio.run(work()))
    return done


def _log(action: str, key: ClientKey) -> None:
    """Log an action that the store's audit log has already."""
    from proxy.storage.audit_log import CLI

    CLI.log(action, key.id, "done")


def _show_secret(key: ClientKey, secret: str, *, as_json: bool) -> None:
    if as_json:
        shown: dict[str, Any] = {**key.public_fields(), "key": secret}
        console.emit_json(shown)
        return
    console.echo(secret)
    console.echo_err(
        f"key {key.id} for {key.name}; it is not shown again. Clients send it as `Authorization: Bearer …`."
    )
