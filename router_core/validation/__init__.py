"""The validation set: prompts with a grader each, the built-in families, the choice of a few. No I/O but files."""
