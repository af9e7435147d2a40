"""`python -m proxy.cli` is `uniroute`."""

from proxy.cli import main

main()
