"""Serve as `uniroute serve` does, on a socket that the parent has bound: `python -m tests.support.serve DESCRIPTOR`.

A port that the parent only chose could be taken by another process in the meantime.
"""

from __future__ import annotations

import os
import socket
import sys
from logging.config import dictConfig
from pathlib import Path

from proxy.server.run import LOGGING, exit_on_signals, run_server
from proxy.settings.schema import load_settings

if __name__ == "__main__":
    exit_on_signals()
    dictConfig(LOGGING)
    run_server(
        load_settings(Path(os.environ["UNIROUTE_CONFIG"]), os.environ),
        socket.socket(fileno=int(sys.argv[1])),
    )
