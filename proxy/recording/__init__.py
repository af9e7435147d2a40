"""What a request took: usage and cost, metrics, the one log line."""
