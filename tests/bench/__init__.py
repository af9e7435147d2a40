"""Programs that measure how cost grows, no tests. Run `python -m tests.bench.fit_growth` or `.decision_growth`."""
