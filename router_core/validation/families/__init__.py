"""The built-in families of validation prompts, one subject a file. Their code computes the right answers."""
