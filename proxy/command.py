"""The command `uniroute`. Ctrl-C ends it without a traceback, also while its modules are imported."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from proxy.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)
