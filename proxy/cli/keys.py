"""`uniroute keys`: client keys, made and revoked in the store itself, with no server needed."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxy.cli.options import ConfigOption, DataDirOption, JsonOption, open_registry, read_settings, run

if TYPE_CHECKING:
    from proxy.state.records import ClientKey

keys = typer.Typer(no_args_is_help=True, help="Client keys. The first one closes the door to calls without a key.")


@keys.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    models: Annotated[list[str] | None, typer.Option("--model", help="Allow only this model; repeatable.")] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Make a key and show it, once."""
    from proxy.cli import console

    _check(name, models or ())

    async def work() -> tuple[ClientKey, str]:
        async with open_registry(read_settings(config, data_dir=data_dir)) as registry:
            return await registry.create_key(name, tuple(models) if models else None)

    key, secret = run(work())
    if as_json:
        console.emit_json({**_shown(key), "key": secret})
        return
    console.say(secret)
    console.note(f"key {key.id} for {name}; it is not shown again. Clients send it as `Authorization: Bearer …`.")


@keys.command("list")
def list_keys(config: ConfigOption = None, data_dir: DataDirOption = None, *, as_json: JsonOption = False) -> None:
    """Show the keys, never their text."""
    from proxy.cli import console

    async def work() -> tuple[ClientKey, ...]:
        async with open_registry(read_settings(config, data_dir=data_dir)) as registry:
            return await registry.list_keys()

    shown = [_shown(key) for key in run(work())]
    if as_json:
        console.emit_json(shown)
        return
    rows = [(k["id"], k["name"], k["created_at"], "revoked" if k["revoked"] else _models(k["models"])) for k in shown]
    console.table(("id", "name", "created", "models"), rows)


@keys.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `keys list` shows it.")],
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Refuse this key from now on. Calls without any key stay refused too."""
    from proxy.cli import console

    async def work() -> None:
        async with open_registry(read_settings(config, data_dir=data_dir)) as registry:
            await registry.revoke_key(key_id)

    run(work())
    console.note(f"key {key_id} is revoked")


def _check(name: str, models: Sequence[str]) -> None:
    """A model may be added after the key that allows it; a name that no model can have is a slip."""
    from proxy.cli.console import BadArgument
    from proxy.settings import check_model_name

    if not name.strip():
        raise BadArgument("NAME: is empty; say whose key it is")
    try:
        for model in models:
            check_model_name(model)
    except ValueError as error:
        raise BadArgument(f"--model: {error}") from None


def _shown(key: ClientKey) -> dict[str, Any]:
    created = datetime.fromtimestamp(key.created_at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    return {"id": key.id, "name": key.name, "created_at": created, "models": key.models, "revoked": key.revoked}


def _models(models: tuple[str, ...] | None) -> str:
    return "all" if models is None else ", ".join(models)
