"""Calls to models, through litellm. Knows no routing and no client."""
