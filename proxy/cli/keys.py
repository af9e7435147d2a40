"""`uniroute keys`: client keys, made, changed and revoked in the store itself, with no server needed."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from proxy.cli.key_options import Body, KeyId, checked, rows_of, seconds_of, states_a_key
from proxy.cli.options import ConfigOption, DataDirOption, JsonOption, open_registry, read_settings, run

if TYPE_CHECKING:
    from proxy.storage.client_keys import ClientKey
    from proxy.storage.registry import KeyRegistry

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
    from proxy.server.admin_schemas import read_new_key
    from proxy.storage.audit_log import CREATE_KEY

    body["name"] = name
    whose, stated = checked(lambda: read_new_key(body, time.time()))
    made = _with_keys(config, data_dir, lambda registry: registry.create(whose, None, stated))
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
    from proxy.server.admin_schemas import read_key_change, shown_key
    from proxy.storage.audit_log import CHANGE_KEY

    if name is not None:
        body["name"] = name
    if all_models:
        if "models" in body:
            raise BadArgument("--all-models: does not go with --model; give one of them")
        body["models"] = None
    if not body:
        raise BadArgument("nothing is stated that should change; see `uniroute keys update --help`")
    stated = checked(lambda: read_key_change(body, time.time()))
    key = _with_keys(config, data_dir, lambda registry: registry.change(key_id, stated))
    _written(CHANGE_KEY, key)
    emit_json(shown_key(key))


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
    from proxy.server.admin_schemas import read_grace
    from proxy.storage.audit_log import ROTATE_KEY

    grace_s = checked(lambda: read_grace({"grace_s": seconds_of(grace, "--grace")}))
    made = _with_keys(config, data_dir, lambda registry: registry.rotate(key_id, grace_s))
    _written(ROTATE_KEY, made[0])
    _show_secret(*made, as_json=as_json)


@keys.command("list")
def list_keys(config: ConfigOption = None, data_dir: DataDirOption = None, *, as_json: JsonOption = False) -> None:
    """Show the keys, never their text."""
    from proxy.cli import console
    from proxy.server.admin_schemas import shown_key

    found = _with_keys(config, data_dir, lambda registry: registry.listed())
    if as_json:
        console.emit_json([shown_key(key) for key in found])
        return
    console.table(("id", "name", "role", "state", "expires", "models"), rows_of(found, time.time()))


@keys.command()
def show(key_id: KeyId, config: ConfigOption = None, data_dir: DataDirOption = None) -> None:
    """What one key may do, as JSON; never its text."""
    from proxy.cli.console import emit_json
    from proxy.server.admin_schemas import shown_key

    emit_json(shown_key(_with_keys(config, data_dir, lambda registry: registry.find(key_id))))


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
    from proxy.server.admin_schemas import shown_key

    if as_json:
        shown: dict[str, Any] = {**shown_key(key), "key": secret}
        console.emit_json(shown)
        return
    console.say(secret)
    console.note(f"key {key.id} for {key.name}; it is not shown again. Clients send it as `Authorization: Bearer …`.")
