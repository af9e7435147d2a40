"""Real servers for tests: a scripted model server, and the proxy as its own process. No mocks."""
