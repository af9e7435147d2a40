"""The service: HTTP, the store, clocks and the environment live here; the numbers are router_core's."""

import sys


def main() -> None:
    """Run the command `uniroute`. Ctrl-C ends it without a traceback, also while its parts are imported."""
    try:
        from proxy.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)
