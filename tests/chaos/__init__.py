"""Two workers under load while faults are injected everywhere, and an account of every request afterwards."""
