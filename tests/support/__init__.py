"""Real servers for tests: a scripted model server, and the proxy as a process of its own. No mocks."""
