"""The command `uniroute`. Commands import what they need when they run, so that `--help` is quick."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Annotated

import typer

from proxy.cli.calibrate import calibrate, lambdas
from proxy.cli.console import BadArgument, CommandError, echo
from proxy.cli.evaluate import evaluate
from proxy.cli.fit import fit
from proxy.cli.inspection import decisions, route, validation
from proxy.cli.keys import keys
from proxy.cli.launch import launch
from proxy.cli.models import models, prices
from proxy.cli.report.savings import report
from proxy.cli.serve import demo, serve, worker

app = typer.Typer(
    name="uniroute",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (serve, launch, demo, worker, route, report, fit, evaluate, calibrate):
    app.command()(command)
for group, name in (
    *((models, "models"), (lambdas, "lambda"), (keys, "keys"), (prices, "prices")),
    *((decisions, "decisions"), (validation, "validation")),
):
    app.add_typer(group, name=name)


def print_version(requested: bool) -> None:  # noqa: FBT001  the shape of an option's callback
    if requested:
        from importlib.metadata import version

        echo(f"uniroute {version('uniroute')} (routing kernels: {_kernels()})")
        raise typer.Exit


def _kernels() -> str:
    """Return which kernels routing uses here: compiled ones, or why NumPy."""
    from pydantic import TypeAdapter, ValidationError

    from router_core.kernels import compiled

    if compiled() is None:
        return "NumPy, as none of this version were compiled"
    try:
        wanted = TypeAdapter(bool).validate_python(os.environ.get("UNIROUTE_COMPILED", True))
    except ValidationError:  # the commands that read settings say what is wrong with it
        wanted = True
    return "compiled" if wanted else "NumPy, as UNIROUTE_COMPILED says"


@app.callback()
def root(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=print_version,
            is_eager=True,
            help="Print the version, and which kernels routing uses.",
        ),
    ] = False,
) -> None:
    """Send each prompt to the model most likely to get it right for the money."""


def main() -> None:
    """Run a command. A wrong argument or failed work becomes one line on stderr and exit status 2 or 1."""
    try:
        try:
            app(prog_name="uniroute")
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except SystemExit:
        raise  # before the imports below, which only errors need
    except BrokenPipeError:
        _discard_output()  # its reader has gone; Python would complain when flushing
        sys.exit(1)
    except OSError as error:
        _discard_output()
        named = f" ({error.filename})" if error.filename else ""
        what = "the work failed" if named else "the output cannot be written"
        _stop(f"{what}: {error.strerror or error}{named}", 1)
    except _argument_errors() as error:
        _stop(str(error), 2)
    except _work_errors() as error:
        _stop(str(error), 1)


def _argument_errors() -> tuple[type[Exception], ...]:
    from proxy.settings.model_config import SettingsError

    return (BadArgument, SettingsError)


def _work_errors() -> tuple[type[Exception], ...]:
    from proxy.cli.local_models import LocalModelError
    from proxy.storage.price_feed import PriceFeedError
    from proxy.storage.redis import StoreUnavailable
    from proxy.storage.registry import RegistryError
    from router_core.errors import RouterCoreError

    return (CommandError, PriceFeedError, LocalModelError, RegistryError, StoreUnavailable, RouterCoreError)


def _discard_output() -> None:
    """Write no more to stdout: what is still buffered would fail again when the interpreter ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _stop(message: str, status: int) -> None:
    from router_core.text import plain

    with suppress(OSError):
        sys.stderr.write(f"uniroute: {' '.join(plain(message, lines=False).split())}\n")
    sys.exit(status)
