from __future__ import annotations

import inspect
import re
import time
from collections.abc import Awaitable, Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from proxy.cli.console import BadArgument
from proxy.cli.options import ConfigOption, DataDirOption, JsonOption, open_registry, read_settings, run

if TYPE_CHECKING:
    from proxy.storage.client_keys import ClientKey
    from proxy.storage.registry import KeyRegistry


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
    from proxy.server.admin_responses import key_to_json

    return [
        (
            *(key.id, key.name, key.role),
            "revoked" if key.revoked else "expired" if key.expired(now) else "active",
            key_to_json(key)["expires_at"] or "never",
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


T = TypeVar("T")

keys = typer.Typer(no_args_is_help=True, help="Client keys. The first one closes the door to calls without a key.")


@keys.command()
@states_a_key
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    *,
    as_json: JsonOption = False,
    body: Body,
) -> None:
    """Make a key and show it, once."""
    from proxy.server.admin_bodies import NewKey, parse_body
    from proxy.storage.audit_log import CREATE_KEY

    body["name"] = name
    stated = checked(lambda: parse_body(NewKey, body).to_change(time.time()))
    made = _with_keys(config, data_dir, lambda registry: registry.create(name, None, stated))
    _written(CREATE_KEY, made[0])
    _show_secret(*made, as_json=as_json)


@keys.command()
@states_a_key
def update(
    key_id: KeyId,
    name: Annotated[str | None, typer.Option("--name", help="Whose key it is.")] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    *,
    all_models: Annotated[bool, typer.Option("--all-models", help="Allow every model again.")] = False,
    body: Body,
) -> None:
    """Change what a key may do. What is not stated stays; `none` takes a limit away."""
    from proxy.cli.console import BadArgument, emit_json
    from proxy.server.admin_bodies import KeyPatch, parse_body
    from proxy.server.admin_responses import key_to_json
    from proxy.storage.audit_log import CHANGE_KEY

    if name is not None:
        body["name"] = name
    if all_models:
        if "models" in body:
            raise BadArgument("--all-models: does not go with --model; give one of them")
        body["models"] = None
    if not body:
        raise BadArgument("nothing is stated that should change; see `uniroute keys update --help`")
    stated = checked(lambda: parse_body(KeyPatch, body).to_change(time.time()))
    key = _with_keys(config, data_dir, lambda registry: registry.change(key_id, stated))
    _written(CHANGE_KEY, key)
    emit_json(key_to_json(key))


@keys.command()
def rotate(
    key_id: KeyId,
    grace: Annotated[str, typer.Option("--grace", metavar="TIME", help="How long the old secret still opens.")] = "0s",
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Give a key a new secret and show it, once. The one before opens until the grace ends."""
    from proxy.server.admin_bodies import Rotation, parse_body
    from proxy.storage.audit_log import ROTATE_KEY

    grace_s = checked(lambda: parse_body(Rotation, {"grace_s": seconds_of(grace, "--grace")}).grace_s)
    made = _with_keys(config, data_dir, lambda registry: registry.rotate(key_id, grace_s))
    _written(ROTATE_KEY, made[0])
    _show_secret(*made, as_json=as_json)


@keys.command("list")
def list_keys(config: ConfigOption = None, data_dir: DataDirOption = None, *, as_json: JsonOption = False) -> None:
    """Show the keys, never their text."""
    from proxy.cli import console
    from proxy.server.admin_responses import key_to_json

    found = _with_keys(config, data_dir, lambda registry: registry.listed())
    if as_json:
        console.emit_json([key_to_json(key) for key in found])
        return
    console.table(("id", "name", "role", "state", "expires", "models"), rows_of(found, time.time()))


@keys.command()
def show(key_id: KeyId, config: ConfigOption = None, data_dir: DataDirOption = None) -> None:
    """What one key may do, as JSON; never its text."""
    from proxy.cli.console import emit_json
    from proxy.server.admin_responses import key_to_json

    emit_json(key_to_json(_with_keys(config, data_dir, lambda registry: registry.find(key_id))))


@keys.command()
def revoke(key_id: KeyId, config: ConfigOption = None, data_dir: DataDirOption = None) -> None:
    """Refuse this key from now on, for good. Calls without any key stay refused too."""
    from proxy.cli import console
    from proxy.storage.audit_log import REVOKE_KEY

    _written(REVOKE_KEY, _with_keys(config, data_dir, lambda registry: registry.revoke(key_id)))
    console.note(f"key {key_id} is revoked")


def _with_keys(config: Path | None, data_dir: Path | None, act: Callable[[KeyRegistry], Awaitable[T]]) -> T:
    settings = read_settings(config, data_dir=data_dir)

    async def work() -> T:
        async with open_registry(settings) as registry:
            return await act(registry.keys)

    done: T = checked(lambda: run(work()))
    return done


def _written(action: str, key: ClientKey) -> None:
    """The store has the audit line already; this one is for whoever listens to the log."""
    from proxy.storage.audit_log import CLI

    CLI.log(action, key.id, "done")


def _show_secret(key: ClientKey, secret: str, *, as_json: bool) -> None:
    from proxy.cli import console
    from proxy.server.admin_responses import key_to_json

    if as_json:
        shown: dict[str, Any] = {**key_to_json(key), "key": secret}
        console.emit_json(shown)
        return
    console.say(secret)
    console.note(f"key {key.id} for {key.name}; it is not shown again. Clients send it as `Authorization: Bearer …`.")
