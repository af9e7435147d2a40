"""The service: HTTP, the store, clocks and the environment live here; the numbers are router_core's."""
