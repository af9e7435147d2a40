"""The command `uniroute`. Commands import what they need when they run, so that `--help` is quick."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

import typer

from proxy.cli.calibrate import calibrate
from proxy.cli.evaluate import evaluate
from proxy.cli.fit import fit
from proxy.cli.keys import keys
from proxy.cli.models import models
from proxy.cli.serve import demo, serve, worker
from proxy.cli.tools import prices, route, validation

app = typer.Typer(
    name="uniroute",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Send each prompt to the model most likely to get it right for the money.",
)
for command in (serve, demo, worker, route, fit, evaluate, calibrate):
    app.command()(command)
for group, name in ((models, "models"), (keys, "keys"), (prices, "prices"), (validation, "validation")):
    app.add_typer(group, name=name)


def main() -> None:
    """Run; a mistake of the user's or failed work is one line on stderr and exit status 2 or 1."""
    try:
        try:
            app(prog_name="uniroute")
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except SystemExit:
        raise  # so that the imports below are for errors alone
    except BrokenPipeError:
        _drop_output()  # the reader of our output left; Python would complain when flushing
        sys.exit(1)
    except OSError as error:
        _drop_output()
        named = f" ({error.filename})" if error.filename else ""
        what = "the work failed" if named else "the output cannot be written"
        _stop(CommandFailed(f"{what}: {error.strerror or error}{named}"), 1)
    except _bad_argument() as error:
        _stop(error, 2)
    except _failed_work() as error:
        _stop(error, 1)


def _bad_argument() -> tuple[type[Exception], ...]:
    from proxy.cli.console import BadArgument
    from proxy.settings.models import SettingsError

    return (BadArgument, SettingsError)


def _failed_work() -> tuple[type[Exception], ...]:
    from proxy.cli.console import CommandError
    from proxy.cli.local_models import LocalModelError
    from proxy.storage.price_feed import PriceFeedError
    from proxy.storage.redis import StoreUnavailable
    from proxy.storage.registry import RegistryError
    from router_core.errors import RouterCoreError

    return (CommandError, PriceFeedError, LocalModelError, RegistryError, StoreUnavailable, RouterCoreError)


class CommandFailed(Exception):
    """What the machine refused: no space, no permission."""


def _drop_output() -> None:
    """Nothing more is written: what is still held would fail again at the end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _stop(error: Exception, status: int) -> None:
    from router_core.text import plain

    with suppress(OSError):
        sys.stderr.write(f"uniroute: {' '.join(plain(str(error), lines=False).split())}\n")
    sys.exit(status)
