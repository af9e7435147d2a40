"""The numbers of routing: embeddings, clusters, profiles, prices, scores. No HTTP, no environment, no clock."""
