"""The service: HTTP, the store, clocks and the environment live here; the numbers are router_core's."""

import sys

# httpx has a command of its own, and imports rich, pygments and click for it: 5 MiB. A module that is None cannot be
# imported, and httpx goes without.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]


def main() -> None:
    """Run the command `uniroute`. Ctrl-C ends it without a traceback, also while its parts are imported."""
    try:
        from proxy.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)
