"""The built-in families, one noun a file. Each makes prompts whose right answers our own code knows."""
