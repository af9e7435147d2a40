"""How many tokens a text is, near enough to price it. Runs no tokenizer: every model has its own."""

BYTES_PER_TOKEN = 4


def text_bytes(text: str) -> int:
    """UTF-8 bytes; a lone surrogate counts as one."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def estimate_tokens(text: str) -> int:
    """Bytes by four, at least one."""
    return max(text_bytes(text) // BYTES_PER_TOKEN, 1)
