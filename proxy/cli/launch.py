from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote, urlsplit

import typer

from proxy.cli import console
from proxy.cli.console import BadArgument, CommandError, ConfigOption, JsonOption
from proxy.cli.launch_clients import AUTO, CLIENTS, KEY_VARIABLE, NO_KEY, Client, Setup, Target, setup_for

if TYPE_CHECKING:
    from proxy.cli.client import ServerClient
    from proxy.settings.schema import Settings


# How long a server may take until it is ready: the first start distils the embedding table.
START_TIMEOUT_S = 300.0

# How long models that are being measured are waited for.
MEASURING_TIMEOUT_S = 600.0

# A server that has just started may not have begun to measure its models.
SETTLING_S = 3.0

RETRY_INTERVAL_S = 0.3

MESSAGE_INTERVAL_S = 5.0

# Beyond the time that open answers have.
KILL_GRACE_PERIOD_S = 10.0

# What stands for the folder of files in `--print`.
FOLDER = "$UNIROUTE_FOLDER"

KEY = f"${KEY_VARIABLE}"

NAMES = ", ".join(client.name for client in CLIENTS if client.program)


def launch(
    client: Annotated[str, typer.Argument(metavar="CLIENT", help=f"{NAMES}; or env, for any other program.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ARGUMENTS]", help="Arguments of the client; of env, the program.")
    ] = None,
    model: Annotated[str, typer.Option("--model", help="The model that the client asks for.")] = AUTO,
    url: Annotated[
        str | None,
        typer.Option("--url", envvar="UNIROUTE_URL", help="A running server; by default the configured one."),
    ] = None,
    config: ConfigOption = None,
    key: Annotated[
        str | None, typer.Option("--key", envvar=KEY_VARIABLE, help="The client key, where the server asks for one.")
    ] = None,
    *,
    detect: Annotated[
        bool, typer.Option("--detect", help="If a server is started: also offer models as `serve --detect` does.")
    ] = False,
    show: Annotated[
        bool,
        typer.Option(
            "--print",
            help="Show what would be set, but for what a running server knows of the model; start nothing.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a client on this router, and end with its exit status. Its own configuration is left as it is.

    Where no server runs, one is started on a free port, and stopped when the client has ended.
    """
    from proxy.cli.client import ServerClient

    chosen, words = find_client(client), tuple(arguments or ())
    if not model:
        raise BadArgument("--model: is empty; give the name of a model, or auto")
    settings = None if url else console.read_settings(config)
    address = configured_url(settings) if settings else base_url(url or "")
    if show or as_json:
        target = Target(address, model, KEY if key else NO_KEY, FOLDER)
        show_setup(chosen, setup_for(chosen, target, os.environ), words, as_json=as_json)
        return
    command = find_program(chosen, words)
    with ExitStack() as stack:
        stack.enter_context(_ended_by_signals())
        if not is_served(address):
            if settings is None:
                raise CommandError(f"no UniRoute server answers at {address}; start one with `uniroute serve`")
            address = stack.enter_context(start_server(settings, config, detect=detect))
        with ServerClient(address, key) as server:
            wait_until_routed(server, model)
            window = context_window(server, model)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="uniroute-launch-")))
        target = Target(address, model, key or NO_KEY, str(folder), window)
        setup = setup_for(chosen, target, os.environ)
        for name, text in setup.files.items():
            (folder / name).write_text(text, "utf-8")
        status = run_client([command[0], *setup.arguments, *command[1:]], environment_of(setup, os.environ))
    raise typer.Exit(status)


def find_client(name: str) -> Client:
    """Raises BadArgument, naming the nearest known one."""
    from router_core.text import closest_name

    known = {client.name: client for client in CLIENTS}
    if name not in known:
        closest = closest_name(name, known)
        hint = f"did you mean {closest!r}? " if closest else ""
        raise BadArgument(
            f"CLIENT: {name!r} is unknown; {hint}known are {', '.join(known)} (env -- PROGRAM: any other)"
        )
    return known[name]


def find_program(client: Client, words: Sequence[str]) -> list[str]:
    """Return the client's command line: the path of its program, and the user's arguments.

    Raises:
        BadArgument: no program is named.
        CommandError: it is not installed.
    """
    if client.program is None and not words:
        raise BadArgument("ARGUMENTS: name the program, as in `uniroute launch env -- python script.py`")
    program, arguments = (client.program, words) if client.program else (words[0], words[1:])
    found = shutil.which(program)
    if found is None:
        how = f"; install it with `{client.install}`" if client.install else ""
        raise CommandError(f"{program} is not installed, or not on PATH{how}")
    return [found, *arguments]


def base_url(url: str) -> str:
    """Return an address without its last slash and without /v1. Raises BadArgument."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadArgument(f"--url: {url!r} is not an address, as http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")


def configured_url(settings: Settings) -> str:
    """Return the address by which this machine reaches the server that the settings describe."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104  reached, not bound
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


def show_setup(client: Client, setup: Setup, words: Sequence[str], *, as_json: bool) -> None:
    """Print the setup, with the name of the variable in place of a key."""
    program, arguments = (client.program, words) if client.program else (words[0] if words else "", words[1:])
    command = [program, *setup.arguments, *arguments] if program else []
    if as_json:
        document = {"client": client.name, "command": command, "environment": dict(setup.environment)}
        console.emit_json({**document, "unset": list(setup.unset), "files": dict(setup.files)})
        return
    if setup.files:
        console.echo('export UNIROUTE_FOLDER="$(mktemp -d)"')
    for name, text in setup.files.items():
        console.echo(f"cat > \"$UNIROUTE_FOLDER/{name}\" <<'END'\n{text.rstrip()}\nEND")
    for name, value in setup.environment.items():
        console.echo(f"export {name}={shell_word(value)}")
    console.echo(f"unset {' '.join(setup.unset)}")
    if command:
        console.echo(f"# {shlex.join(command)}")


def shell_word(value: str) -> str:
    """Quote a value for a shell, but for the variables that we refer to in it."""
    if value in (KEY, FOLDER):
        return f'"{value}"'
    folder, slash, name = value.partition("/")
    return f'"{FOLDER}"/{shlex.quote(name)}' if folder == FOLDER and slash else shlex.quote(value)


def is_served(url: str) -> bool:
    """Tell whether a server answers.

    Raises:
        CommandError: something else than UniRoute does.
    """
    import httpx

    from proxy.settings.outbound import OutboundConnectError, http_client

    try:
        with http_client(timeout=10) as http:
            reply = http.get(f"{url}/healthz")
            if reply.is_success and reply.json() == {"status": "ok"}:
                return True
    except OutboundConnectError as error:
        raise CommandError(f"the server at {url} cannot be reached: {error}") from None
    except httpx.TransportError:
        return False
    except ValueError:
        pass
    raise CommandError(f"what answers at {url} is no UniRoute server; give another --url, or set UNIROUTE_PORT")


@contextmanager
def start_server(settings: Settings, config: Path | None, *, detect: bool) -> Iterator[str]:
    """Run `uniroute serve` for this machine alone until the block ends; yield its address once it is ready."""
    from proxy.cli.client import wait_until_ready
    from proxy.server.run import address, listen
    from proxy.server.startup import check_data_dir

    check_data_dir(settings)
    log = settings.data_dir / "launch.log"
    bound = listen("127.0.0.1", 0)
    url = address(bound)
    options = [*(("--config", str(config)) if config else ()), *(("--detect",) if detect else ())]
    # The socket itself: a port that was only chosen could be taken by another program meanwhile.
    command = [sys.executable, "-P", "-m", "proxy.cli", "serve", "--fd", str(bound.fileno()), "--end-with-stdin"]
    console.echo_err(f"starting a server at {url}; its log is {log}")
    with bound, log.open("wb") as output:
        # A session of its own: Ctrl-C is for the client, which may go on after it.
        server = subprocess.Popen(  # noqa: S603  our own interpreter and module
            [*command, *options],
            pass_fds=(bound.fileno(),),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        if not wait_until_ready(url, lambda seconds: time.monotonic() > deadline or has_ended(server, seconds)):
            raise CommandError(f"the server did not start: {_last_line(log)} (see {log})")
        yield url
        if server.poll() is not None:
            console.echo_err(f"the server ended before the client, with status {server.returncode}; see {log}")
    finally:
        assert server.stdin is not None
        server.stdin.close()
        if not has_ended(server, settings.drain_s + KILL_GRACE_PERIOD_S):
            server.kill()
            server.wait()


def has_ended(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Wait for a process, and tell whether it has ended."""
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def wait_until_routed(server: ServerClient, model: str) -> None:
    """Return once the server would answer a request; models that are being measured are waited for.

    A client would meet a refusal in words of its own, or keep trying.

    Raises:
        CommandError: with the server's message.
    """
    from proxy.cli.client import KeyRefused, ServerUnavailable

    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
    began, shown = time.monotonic(), -MESSAGE_INTERVAL_S
    while True:
        try:
            server.call("POST", "/v1/route", body)
            return
        except KeyRefused as error:
            raise CommandError(f"{error}; here it is --key, or {KEY_VARIABLE} in the environment") from None
        except ServerUnavailable as error:
            waited = time.monotonic() - began
            if waited > (MEASURING_TIMEOUT_S if error.passing else SETTLING_S):
                raise
            if error.passing and waited > shown + MESSAGE_INTERVAL_S:
                console.echo_err(f"waiting: {error}")
                shown = waited
            time.sleep(RETRY_INTERVAL_S)


def context_window(server: ServerClient, model: str) -> int | None:
    """Return how many tokens the model reads, of a name that routes the widest of its models; None if not known."""
    found = server.call("GET", f"/v1/models/{quote(model, safe='/:@')}").get("context_length")
    return found if isinstance(found, int) else None


def environment_of(setup: Setup, environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in {**environ, **setup.environment}.items() if name not in setup.unset}


def run_client(command: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run a client in the foreground; return its exit status, or 128 and the number of the signal that ended it.

    Ctrl-C is the client's: the terminal sends it to both. A signal that ends this process is passed on.
    """
    running: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        received.append(number)
        for process in running:
            process.send_signal(number)

    def leave_to_client(*_: object) -> None:
        """Do nothing. An ignored signal would be ignored by the client too."""

    with _handling({signal.SIGINT: leave_to_client, signal.SIGQUIT: leave_to_client, **_ending(pass_on)}):
        running.append(subprocess.Popen(list(command), env=dict(environ)))  # noqa: S603  what the user asked for
        for number in received:  # while it was started
            running[0].send_signal(number)
        status = running[0].wait()
    return status if status >= 0 else 128 - status


Handler = Callable[[int, FrameType | None], None]


def _ended_by_signals() -> AbstractContextManager[None]:
    """End this process in order when it is told to, so that nothing it started is left behind."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    return _handling(_ending(leave))


def _ending(handler: Handler) -> dict[signal.Signals, Handler]:
    return dict.fromkeys((signal.SIGTERM, signal.SIGHUP), handler)


@contextmanager
def _handling(handlers: Mapping[signal.Signals, Handler]) -> Iterator[None]:
    """Handle signals within this context, but for those that whoever started us had us ignore."""
    before = {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"
