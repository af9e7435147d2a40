"""Run two workers under load while faults are injected everywhere, then account for every request."""
