"""Faults of the store and of processes, with real ones."""
