"""A connection to Ray: one started here for as long as it is needed, or one that runs already. Knows no prompts."""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from proxy.cli.console import BadArgument, CommandError

LOCAL = "local"
_ALWAYS = {"RAY_USAGE_STATS_ENABLED": "0"}
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""What makes Ray listen on 127.0.0.1 alone, on Linux too, despite its name."""
_SHORT_FOLDER = "/tmp"  # noqa: S108 - sockets lie in a private folder of it, and their paths have 104 bytes at most
_BLOCK_BYTES = 1 << 22
"""Of rows that pass from worker to worker: small, so that one large file keeps all of them busy."""
_HOST_AND_PORT = re.compile(r"(?:ray://)?\[?(?P<host>[^\[\]/]+)\]?:(?P<port>\d+)")
_ADDRESS_TIMEOUT_S = 5.0


@contextmanager
def connected(address: str, workers: int | None) -> Iterator[int]:
    """How many workers there are: as asked for, else one per CPU; elsewhere one CPU is left to those who read.

    Raises:
        BadArgument: Ray is not installed, or does not answer at `address`.
        CommandError: Ray failed while it was used.
    """
    if find_spec("ray") is None or find_spec("pyarrow") is None:
        raise BadArgument("--ray needs Ray Data; pip install 'uniroute[ray]'")
    _check_address(address)
    os.environ.update(_ALWAYS)  # Ray reads its environment when it is imported
    with tempfile.TemporaryDirectory(prefix="uniroute-", dir=_SHORT_FOLDER, ignore_cleanup_errors=True) as scratch:
        local = workers or os.cpu_count() or 1
        _connect(address, _ray_of_our_own(local, scratch) if address == LOCAL else {})
        import ray

        try:
            yield workers or (local if address == LOCAL else max(1, int(ray.cluster_resources().get("CPU", 1)) - 1))
        except ray.exceptions.RayError as error:
            raise CommandError(f"Ray: {str(error).strip().splitlines()[-1]}") from None
        finally:
            ray.shutdown()


def _ray_of_our_own(workers: int, scratch: str) -> dict[str, Any]:
    """It listens on loopback alone, wants a token, has no dashboard, and keeps what it writes in `scratch`."""
    os.environ.update(_LOOPBACK, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    own: dict[str, Any] = {"num_cpus": workers + 1, "include_dashboard": False}
    return own | {"_node_ip_address": "127.0.0.1", "_temp_dir": scratch}


def _connect(address: str, own: dict[str, Any]) -> None:
    import ray
    from ray.data import DataContext

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, **own)
    except (ConnectionError, ValueError) as error:
        raise BadArgument(f"--ray {address}: {' '.join(str(error).split())}") from None
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = _BLOCK_BYTES


def _check_address(address: str) -> None:
    """Whether something listens there: Ray itself would go on trying for ever. Raises BadArgument."""
    stated = _HOST_AND_PORT.fullmatch(address)
    if stated is None and address not in {LOCAL, "auto"}:
        raise BadArgument(f"--ray {address}: must be local, auto, HOST:PORT or ray://HOST:PORT")
    try:
        if stated:
            socket.create_connection((stated["host"], int(stated["port"])), _ADDRESS_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise BadArgument(f"--ray {address}: nothing answers there ({error})") from None
