"""Ways to route that are measured side by side. Each estimates errors from the same embeddings and the same answers."""
