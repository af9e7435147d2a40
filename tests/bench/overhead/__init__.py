"""What the proxy costs: a loopback upstream, a load generator, ours and others between them."""
