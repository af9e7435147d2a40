"""Serve as `uniroute serve` does, on a socket that the parent has bound: `python -m tests.support.serve DESCRIPTOR`.

A port that the parent only chose could be taken by another process in the meantime. Tests of the store's time limits
run `uniroute serve`, or state the limit.
"""

from __future__ import annotations

import os
import socket
import sys
from logging.config import dictConfig
from pathlib import Path

from proxy.server.run import LOGGING, exit_on_signals, run_server
from proxy.settings.schema import Settings, load_settings
from proxy.storage import redis, sessions

# A busy machine lets a store that is well take longer than a server waits for it, which then answers without it.
STORE_S = 5.0
LOOKUP_S = 1.0


def be_patient_with_the_store(settings: Settings) -> Settings:
    redis.OPERATION_TIMEOUT_S = STORE_S
    sessions.LOOKUP_TIMEOUT_S = LOOKUP_S
    stated = "limits_timeout_s" in settings.model_fields_set
    return settings if stated else settings.model_copy(update={"limits_timeout_s": LOOKUP_S})


if __name__ == "__main__":
    exit_on_signals()
    dictConfig(LOGGING)
    run_server(
        be_patient_with_the_store(load_settings(Path(os.environ["UNIROUTE_CONFIG"]), os.environ)),
        socket.socket(fileno=int(sys.argv[1])),
    )
