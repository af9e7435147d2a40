"""What the proxy knows and where it is kept: Redis, the snapshot of it, and every write to it."""
