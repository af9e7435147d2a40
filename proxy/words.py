"""Long tables of names, written as text."""


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())
