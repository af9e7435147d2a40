"""What is looked at of a long text: its two ends. Which text that is, is decided elsewhere."""

from __future__ import annotations

CUT = 2_000
"""Characters kept from each end."""


def excerpt(text: str) -> str:
    """The text, or its two ends where it is longer than both; blanks around a long one do not count.

    Whatever is embedded goes through here first, so that a prompt has one vector whether it is fitted or routed.
    """
    if len(text) <= 2 * CUT:
        return text
    said = text.strip()
    return said if len(said) <= 2 * CUT else f"{said[:CUT]}\n{said[-CUT:]}"
